# SPDX-License-Identifier: Apache-2.0
"""Videos in released models: what their processors make of the same frames, and masks that leave them out."""

from __future__ import annotations

import json
import re

import pytest
import torch
from PIL import Image

from moellava.cli import main as moellava
from moellava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX
from moellava.data.media_reader import modality_of, video_arguments
from moellava.data.video import read_video
from moellava.errors import DataError, UserError
from moellava.serve.answer import Prompts, stream
from moellava.serve.generate import Sampling
from moellava.serve.prompt import Request
from moellava.train.arguments import parse_arguments
from tests.lmm.tiny import NATIVE, TINY, WITH_VIDEO, batch_of
from tests.processes import train_here, words_of

AS_IMAGES = [name for name in NATIVE if name not in WITH_VIDEO]
"""Those that see a video as its frames."""

FRAMES = 3
RECORDS = [
    {
        "id": "clip",
        "video": "shapes.mp4",
        "conversations": [
            {"from": "human", "value": "<video>\nWhat is shown?"},
            {"from": "gpt", "value": "Shapes."},
            {"from": "human", "value": "Any other?"},
            {"from": "gpt", "value": "None."},
        ],
    },
    {
        "id": "both",
        "image": "0.png",
        "video": ["wide.mp4", "short.mkv"],
        "conversations": [
            {"from": "human", "value": "Here <video> and <image> and <video> are, which moves?"},
            {"from": "gpt", "value": "The first."},
        ],
    },
    {
        "id": "image",
        "image": "1.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A fractal."}],
    },
    {"id": "text", "conversations": [{"from": "human", "value": "Hi <|im_end|>"}, {"from": "gpt", "value": "Hello."}]},
]


@pytest.fixture
def videos_of(samples_of, clips):
    """(family, records, options) -> the data set of that family's tiny model; a video is 3 frames."""

    def make(family_id, records=RECORDS, **options):
        return samples_of(family_id, records, **{"video_folder": clips, "num_frames": FRAMES} | options)

    return make


def expected(reader, record, shown):
    """What the processor itself gives for a record, shown images and videos in the order of their tags."""
    processor = reader.processor
    messages = []
    for turn in record["conversations"]:
        parts = []
        if turn["from"] == "human":
            for word in turn["value"].replace("<video>\n", "<video>").replace(">", ">|").replace("<", "|<").split("|"):
                modality = word.strip("<>") if word in ("<video>", "<image>") else None
                parts += [{"type": modality}] if modality else [{"type": "text", "text": word}] if word else []
        else:
            parts = [{"type": "text", "text": turn["value"]}]
        messages.append({"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": parts})
    text = processor.apply_chat_template(messages, chat_template=processor.chat_template, tokenize=False)
    images = [one for one in shown if isinstance(one, Image.Image)]
    videos = [one for one in shown if not isinstance(one, Image.Image)]
    given = ({"images": [images]} if images else {}) | (
        video_arguments([videos], reader.nests["video"]) if videos else {}
    )
    bos = processor.tokenizer.bos_token
    spelled = bool(bos) and text.startswith(bos)
    return dict(processor(text=[text], return_tensors="pt", add_special_tokens=not spelled, **given))


@pytest.mark.slow
@pytest.mark.parametrize("family_id", WITH_VIDEO)
def test_a_batch_is_what_the_processor_makes_of_the_rendered_text(family_id, videos_of, clips, pictures):
    dataset = videos_of(family_id)
    clip, wide, short = (read_video(clips / name, FRAMES) for name in ("shapes.mp4", "wide.mp4", "short.mkv"))
    image = Image.open(pictures[0]).convert("RGB")
    shown = {0: [clip], 1: [wide, image, short]}
    if family_id == "smolvlm":
        del shown[1]  # its processor lets the images of a text go when there are videos in it
    for number, media in shown.items():
        batch = batch_of(family_id, dataset, number)
        wanted = expected(dataset.encoder.reader, RECORDS[number], media)
        assert set(batch) == set(wanted) | {"labels"}
        for name, value in wanted.items():
            torch.testing.assert_close(batch[name], torch.as_tensor(value), rtol=0, atol=0, msg=f"{number} {name}")
        assert dataset.lengths[number] == batch["input_ids"].shape[1]
    assert dataset.shows_media == [True, True, True, False]


@pytest.mark.parametrize("family_id", WITH_VIDEO)
def test_only_answers_train_and_a_row_does_not_feel_the_others(family_id, videos_of, opened):
    """A batch of a video, a video beside an image, an image, and text; then each of them alone."""
    records = [RECORDS[0] | {"conversations": [*RECORDS[0]["conversations"][:3], TYPED]}, *RECORDS[1:]]
    dataset, model = videos_of(family_id, records), opened(family_id).model
    tokenizer = dataset.encoder.tokenizer
    batch = batch_of(family_id, dataset, 0, 1, 2, 3)
    decoded = [tokenizer.decode(row[row != IGNORE_INDEX]) for row in batch["labels"]]
    end = tokenizer.eos_token
    assert [text.replace(" ", "") for text in decoded] == [
        f"Shapes.{end}No<video>,no{end}",
        f"Thefirst.{end}",
        f"Afractal.{end}",
        f"Hello.{end}",
    ]
    trained = batch["labels"] != IGNORE_INDEX
    assert torch.equal(batch["labels"][trained], batch["input_ids"][trained])
    with torch.no_grad():
        logits = model(**batch).logits
        for row in range(4):
            alone = batch_of(family_id, dataset, row)
            kept = alone["attention_mask"][0].bool()
            whole = model(**alone).logits[0, kept]
            torch.testing.assert_close(logits[row, : len(whole)], whole, rtol=1e-4, atol=1e-5)


TYPED = {"from": "gpt", "value": "No <video>, no"}


@pytest.mark.parametrize("family_id", WITH_VIDEO)
def test_what_is_seen_decides_what_is_said(family_id, videos_of, opened, clips):
    """Other frames, other logits; so the tensors reach the places that their tokens stand at."""
    said = []
    for name in ("shapes.mp4", "wide.mp4"):
        dataset = videos_of(family_id, [RECORDS[0] | {"video": name}])
        batch = batch_of(family_id, dataset, 0)
        with torch.no_grad():
            said.append(opened(family_id).model(**batch).logits[0, -1])
    assert not torch.allclose(*said, atol=1e-6)


@pytest.mark.parametrize("family_id", AS_IMAGES)
def test_elsewhere_a_video_is_its_frames_as_images(family_id, videos_of, clips, tmp_path):
    paths = []
    for number, frame in enumerate(read_video(clips / "shapes.mp4", FRAMES).frames):
        frame.save(tmp_path / f"{number}.png")
        paths.append(str(tmp_path / f"{number}.png"))
    said = RECORDS[0]["conversations"]
    spelled = {
        "image": paths,
        "conversations": [said[0] | {"value": "<image>" * FRAMES + "\nWhat is shown?"}, *said[1:]],
    }
    dataset = videos_of(family_id, [RECORDS[0], spelled])
    clip, images = batch_of(family_id, dataset, 0), batch_of(family_id, dataset, 1)
    assert clip.keys() == images.keys() and dataset.lengths[0] == dataset.lengths[1]
    assert all(torch.equal(clip[name], images[name]) for name in clip)
    assert dataset[0]["input_ids"].tolist().count(IMAGE_TOKEN_INDEX) == FRAMES
    assert all(isinstance(shown, Image.Image) for shown in dataset[0]["media"])


@pytest.mark.parametrize("family_id", ["llava-1.5", "qwen3-vl"])
def test_a_video_is_never_cut(family_id, videos_of):
    """However little room there is, a record keeps all of a video or nothing of it."""
    said = [("human", "<video> a"), ("gpt", "b"), ("human", "<video> c"), ("gpt", "d")]
    turns = [{"from": role, "value": text} for role, text in said]
    record = {"id": "two", "video": ["shapes.mp4", "wide.mp4"], "conversations": turns}
    whole = videos_of(family_id, [record])
    full, units = whole.lengths[0], len(whole[0]["media"])
    seen = set()
    for max_length in range(full * 2 // 3, full + 1, 2):
        text = {"id": "text", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
        dataset = videos_of(family_id, [record, text], overlong="truncate", max_length=max_length)
        if len(dataset) == 1:
            continue
        sample = dataset[0]
        assert len(sample["media"]) in (units // 2, units)
        assert batch_of(family_id, dataset, 0)["input_ids"].shape[1] == dataset.lengths[0] <= max_length
        seen.add(len(sample["media"]))
    assert seen == {units // 2, units}


@pytest.mark.parametrize("family_id", [name for name in TINY if TINY[name].video_prompt])
def test_what_a_model_reads(family_id, videos_of):
    dataset = videos_of(family_id, [RECORDS[0] | {"conversations": RECORDS[0]["conversations"][:2]}])
    text = dataset.encoder.tokenizer.decode(batch_of(family_id, dataset, 0)["input_ids"][0])
    text = re.sub(r"(<[^<>]+>)\1+", lambda run: f"{run[1]}×{len(run[0]) // len(run[1])}", text)
    # Spaces apart: SentencePiece's decoder shows some more behind special tokens.
    assert text.replace(" ", "") == TINY[family_id].video_prompt.replace(" ", "")


@pytest.mark.slow
def test_times_are_told_to_models_that_read_them(videos_of, clips):
    """Qwen3-VL's tokens name the seconds of the frames that were chosen, SmolVLM's the minutes and the duration."""
    for family_id, words in {"qwen3-vl": ["<1.1 seconds>", "<4.8 seconds>"], "smolvlm": ["0:00:05", "00:04"]}.items():
        dataset = videos_of(family_id)
        batch = batch_of(family_id, dataset, 0)
        text = dataset.encoder.tokenizer.decode(batch["input_ids"][0])
        assert all(word in text for word in words), text
        assert dataset.encoder.reader.is_timed
    assert not videos_of("qwen2-vl").encoder.reader.is_timed
    batch = batch_of("qwen2.5-vl", videos_of("qwen2.5-vl"), 0)
    assert batch["second_per_grid_ts"].tolist() == pytest.approx([2 / (3 / 20 * 4)])


def test_pixels_of_images_and_videos_under_one_name_go_in_the_order_of_their_tokens(videos_of):
    for family_id in ("internvl", "smolvlm"):
        dataset = videos_of(family_id)
        reader, sample = dataset.encoder.reader, dataset[1]
        assert [t for t in sample["input_ids"].tolist() if t < 0] == [
            VIDEO_TOKEN_INDEX,
            IMAGE_TOKEN_INDEX,
            VIDEO_TOKEN_INDEX,
        ]
        assert [modality_of(one) for one in sample["media"]] == ["video", "image", "video"]
        alone = [reader.read([[one]]).tensors["pixel_values"].flatten(0, -4) for one in sample["media"]]
        together = batch_of(family_id, dataset, 1)["pixel_values"].flatten(0, -4)
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.slow
def test_what_cannot_be_shown_is_named_before_training(videos_of, opened):
    with pytest.raises(
        DataError, match="Record clip of .*short.mkv: the video has 3 frames but --num_frames asks for 4"
    ):
        videos_of("qwen2-vl", [RECORDS[0] | {"video": "short.mkv"}], num_frames=4)
    template = opened("llava-onevision").processor.chat_template.replace("<video>", "")
    with pytest.raises(DataError, match="Record clip of .* has 1 videos, but its chat template shows 0"):
        videos_of("llava-onevision", [RECORDS[0]], template=template)
    with pytest.raises(DataError, match="Record clip of .*: the processor cannot take videos of .*64, 64"):
        videos_of("qwen3-vl", [RECORDS[0]], num_frames=1)
    with pytest.raises(DataError, match="Record clip of .* has a video, but this model reads images by their paths"):
        videos_of("llava-1.5", [RECORDS[0]], loads_images=False)


def test_a_collator_counts_what_stands_behind_placeholders(videos_of, opened):
    sample = videos_of("qwen2-vl")[1]
    with pytest.raises(ValueError, match="Record both of .* has 3 placeholders but 2 media"):
        opened("qwen2-vl").collator()([sample | {"media": sample["media"][:2]}])


@pytest.mark.parametrize("family_id", ["qwen2.5-vl", "qwen3-vl", "internvl", "llava-1.5"])
def test_chat_reads_what_training_shows(family_id, videos_of, opened, clips, pictures):
    """A video and an image between two texts, up to where the answer begins; and an answer comes."""
    dataset, vlm = videos_of(family_id), opened(family_id)
    batch = batch_of(family_id, dataset, 1)
    prompt = int((batch["labels"][0] == IGNORE_INDEX).long().cumprod(0).sum())
    videos = [read_video(clips / name, FRAMES) for name in ("wide.mp4", "short.mkv")]
    request = Request(RECORDS[1]["conversations"][0]["value"], [pictures[0]], videos=videos)
    prompts = Prompts(vlm)
    inputs = prompts.batch([prompts.example(request)])
    assert torch.equal(inputs["input_ids"][0], batch["input_ids"][0, :prompt])
    assert all(
        torch.equal(inputs[name], batch[name]) for name in inputs if name.startswith(("pixel", "video", "image"))
    )
    said = "".join(stream(vlm, request, Sampling(max_new_tokens=3)))
    tokens = vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, prompt:]
    assert said == vlm.tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.fixture
def run_on(small_lmm, released_flags, clips, tmp_path):
    """(records, flags) -> the folder and the log lines that a run of the tiny Qwen2.5-VL leaves, in this process."""

    def run(records, **flags):
        (tmp_path / "videos.json").write_text(json.dumps(records))
        data = {"data_path": tmp_path / "videos.json", "video_folder": clips, "num_frames": FRAMES}
        roles = {"user_key": "human", "assistant_key": "gpt"}
        flags = released_flags(small_lmm("qwen2.5-vl"), "run", **data, **roles, **{"model_max_length": 512} | flags)
        folder = train_here(flags)
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return folder, [row for row in history if "loss" in row]

    return run


@pytest.mark.slow
def test_training_on_videos_images_and_text_lowers_the_loss(run_on, clips, capsys):
    """A run of train.py, and a question about a video to the folder that it leaves."""
    folder, rows = run_on([*RECORDS, *RECORDS], max_steps=8, learning_rate=5e-2)
    losses = [row["loss"] for row in rows]
    assert sum(losses[-2:]) < 0.6 * sum(losses[:2]), losses
    words = ["--video-file", str(clips / "shapes.mp4"), "--num-frames", "3", "--question", "What is shown?"]
    assert moellava(["chat", "--model-path", str(folder), *words, "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_a_videos_tokens_are_image_tokens_to_the_load_of_experts(run_on):
    sparse = {"moe_enable": True, "moe_mode": "dense", "num_experts": 2}
    _, (row,) = run_on(RECORDS[:1], max_steps=1, skip_dry_save=True, per_device_train_batch_size=1, **sparse)
    assert sum(value for name, value in row.items() if name.startswith("expert_load_image/layer_0/")) == 1


def test_flags_of_videos_are_checked(small_lmm, released_flags):
    flags = released_flags(small_lmm("qwen2-vl"), "run", num_frames=0)
    with pytest.raises(UserError, match="--num_frames 0: a video is at least 1 frame"):
        parse_arguments(words_of(flags))


@pytest.mark.parametrize("family_id", ["llava-onevision", "qwen2.5-vl", "internvl"])
def test_every_batch_runs_the_tower_equally_often(family_id, videos_of, opened, monkeypatch):
    """A video, an image, both, or neither; and what is blank changes nothing that is said."""
    dataset, model = videos_of(family_id), opened(family_id).model
    assert dataset.modalities == ("image", "video")
    collator = opened(family_id).collator()
    tower = model.model.visual if family_id == "qwen2.5-vl" else model.model.vision_tower
    passes = []
    monkeypatch.setattr(
        tower, "forward", lambda *args, forward=tower.forward, **more: passes.append(1) or forward(*args, **more)
    )
    counts = set()
    for number in range(4):
        collator.modalities = dataset.modalities
        batch, plain = collator([dataset[number]]), collator.of_prompts()([dataset[number]])
        length = int(plain["attention_mask"].sum())
        assert int(batch["attention_mask"].sum()) == length and (batch["labels"][0, length:] == IGNORE_INDEX).all()
        with torch.no_grad():
            passes.clear()
            logits = model(**batch).logits[0, :length]
            counts.add(len(passes))
            torch.testing.assert_close(logits, model(**plain).logits[0, :length], rtol=1e-4, atol=1e-5)
    assert counts == {1 if family_id == "internvl" else 2}
    assert videos_of(family_id, RECORDS[3:]).modalities == () and videos_of("llava-1.5").modalities == ("image",)
