# SPDX-License-Identifier: Apache-2.0
"""Videos in the records of a composed model: each is its frames as images, and its file is looked at first."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from PIL import Image

from moellava.cli import main
from moellava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moellava.data.collate import MediaCollator
from moellava.data.encoder import CountedImages
from moellava.data.images import open_image
from moellava.data.media import MediaFiles
from moellava.data.records import Medium, media_of
from moellava.data.render.jinja import jinja_of
from moellava.data.video import read_video
from moellava.data.view import views_of
from moellava.errors import DataError
from moellava.mm_utils import pixel_values

PATCHES, FRAMES = 4, 3


@pytest.fixture
def rows(make_record) -> list[dict]:
    return [
        make_record("clip", "<video>\nwhat?", "red", video="shapes.mp4"),
        make_record(
            "both", "<image> or <video>?", "a", "and <video>?", "b", image="a.png", video=["wide.mp4", "short.mkv"]
        ),
        make_record("image", "<image>\nwhat?", "a", image="a.png"),
        make_record("text", "hi", "ho"),
    ]


def test_a_video_is_its_frames_as_images(make, rows, reader, image_processor, image_tree, clips):
    data = make(rows)
    assert data.shows_media == [True, True, True, False] and data.modalities == ("image",)
    for sample, length, images in zip(data, data.lengths, [FRAMES, 1 + 2 * FRAMES, 1, 0], strict=True):
        ids = sample["input_ids"].tolist()
        assert ids.count(IMAGE_TOKEN_INDEX) == len(sample["media"]) == images
        assert length == len(ids) + images * (PATCHES - 1)
        assert IMAGE_TOKEN_INDEX not in sample["labels"].tolist()
    shown = [open_image(image_tree / "a.png")]
    shown += [frame for name in ("wide.mp4", "short.mkv") for frame in read_video(clips / name, FRAMES).frames]
    batch = MediaCollator(reader, pad_token_id=0)([data[1]])
    assert torch.equal(batch["pixel_values"], pixel_values(shown, image_processor, "square"))


def test_ids_and_labels_are_those_of_a_record_that_shows_the_frames(make, rows, make_record):
    """In every template, whatever it puts around images."""
    frames = make_record("frames", "<image>" * FRAMES + "\nwhat?", "red", image=["a.png"] * FRAMES)
    for version in ("qwen", "v1", "v1_mmtag", "plain"):
        clip, spelled = make([rows[0], frames], version=version)
        assert torch.equal(clip["input_ids"], spelled["input_ids"])
        assert torch.equal(clip["labels"], spelled["labels"])


def test_a_batch_of_videos_images_and_text(make, rows, reader):
    data = make(rows)
    batch = MediaCollator(reader, pad_token_id=0)([data[index] for index in range(4)])
    images, is_image = [FRAMES, 1 + 2 * FRAMES, 1, 0], batch["input_ids"] == reader.placeholder_id
    assert is_image.sum(dim=1).tolist() == [count * PATCHES for count in images]
    assert len(batch["pixel_values"]) == sum(images)
    assert (batch["labels"][is_image] == IGNORE_INDEX).all()
    assert batch["attention_mask"].sum(dim=1).tolist() == data.lengths


def test_a_video_is_never_cut(make, rows, make_record):
    row = make_record("two", "<video> q", "a", "<video> r", "b", video=["shapes.mp4", "wide.mp4"])
    whole = make([row])
    ids = whole[0]["input_ids"].tolist()
    second = [index for index, token in enumerate(ids) if token == IMAGE_TOKEN_INDEX][FRAMES]
    before = second + FRAMES * (PATCHES - 1)
    for max_length in range(before, before + FRAMES * PATCHES):
        data = make([row], max_length=max_length, overlong="truncate")
        assert len(data[0]["input_ids"]) == second and data.lengths == [before]
        assert data[0]["media"] == whole[0]["media"][:FRAMES]
    fits = make([row], max_length=before + FRAMES * PATCHES, overlong="truncate")
    assert len(fits[0]["media"]) == 2 * FRAMES
    assert make([row], max_length=whole.lengths[0], overlong="error").lengths == whole.lengths
    with pytest.raises(DataError, match=f"takes {whole.lengths[0]} positions"):
        make([row], max_length=whole.lengths[0] - 1)


def test_bad_videos_are_named_before_training_or_skipped(make, rows, make_record):
    bad = [make_record(name, "<video>", "a", video=name) for name in ("gone.mp4", "text.mp4", "cut.mp4", "sound.wav")]
    with pytest.raises(DataError) as error:
        make([*rows, *bad], num_frames=4)
    for name in ("gone.mp4", "text.mp4", "cut.mp4", "sound.wav", "short.mkv"):
        assert sum(name in problem for problem in error.value.problems) == 1
    assert any("Record both of" in p and "3 frames but --num_frames asks for 4" in p for p in error.value.problems)
    data = make([*rows, *bad], bad_files="skip")
    assert (data.report()["bad_files"], len(data)) == (4, 4)
    with pytest.raises(DataError, match="1 images and 3 videos are named in the data, but --is_multimodal False"):
        make(rows, takes_media=False)


def test_a_video_that_breaks_later_is_named(make, make_record, clips, tmp_path):
    content = (clips / "shapes.mp4").read_bytes()
    (tmp_path / "x.mp4").write_bytes(content)
    data = make([make_record("x", "<video>", "a", video="x.mp4")], video_folder=tmp_path)
    assert len(data[0]["media"]) == FRAMES
    (tmp_path / "x.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="Record x of .*x.mp4.*check-data"):
        data[0]


def test_videos_lie_beside_images_unless_told_otherwise(clips, image_tree):
    clip = Medium("video", "shapes.mp4")
    assert MediaFiles(clips).file_of(clip) == clips / "shapes.mp4"
    assert MediaFiles(image_tree, clips).file_of(clip) == clips / "shapes.mp4"
    assert MediaFiles(image_tree, clips).file_of(Medium("image", "a.png")) == image_tree / "a.png"


@pytest.mark.slow
@pytest.mark.parametrize("version", ["qwen", "chat_template"])
def test_a_data_set_with_videos_can_be_sent_to_spawned_workers(make, rows, monkeypatch, reader, version):
    monkeypatch.setattr("moellava.data.media.CLIPS_KEPT", 1)
    monkeypatch.setattr(reader.processor.tokenizer, "chat_template", jinja_of("qwen"))
    made = make(rows, version=version)
    data = pickle.loads(pickle.dumps(made))
    assert len(data[0]["media"]) == FRAMES and data[0]["input_ids"].tolist() == made[0]["input_ids"].tolist()
    assert [len(data.files.read(medium).frames) for medium in media_of(rows[1]) if medium.modality == "video"] == [
        FRAMES
    ] * 2


def test_check_data_opens_every_video(rows, data_file, make_record, image_tree, clips, golden_tokenizers, capsys):
    rows += [make_record("bad", "<video>", "a", video="damaged.mp4")]
    rows += [make_record("tags", "<video><video>", "a", video="shapes.mp4")]
    folders = ["--image-folder", str(image_tree), "--video-folder", str(clips)]
    words = ["check-data", str(data_file(rows)), *folders, "--num-frames", "3", "--json"]
    tokenizer = ["--tokenizer", str(golden_tokenizers / "phi"), "--version", "phi", "--tokens-per-image", "5"]
    assert main([*words, *tokenizer, "--max-length", "60"]) == 1
    found = json.loads(capsys.readouterr().out)
    texts = [problem["text"] for problem in found["problems"]]
    assert len(texts) == 3
    assert "Record tags of" in texts[0] and "1 videos but 2 <video> tags" in texts[0]
    assert "Record both of" in texts[1] and "positions, more than 60" in texts[1]
    assert "Record bad of" in texts[2] and "damaged.mp4: the video" in texts[2]
    counts = {"with_image": 2, "with_video": 3, "text_only": 1, "images_named": 2, "videos_named": 4, "video_files": 4}
    assert counts.items() <= found["counts"].items()
    assert main([*words[:-1], "--num-frames", "4"]) == 1
    assert "short.mkv: the video has 3 frames but --num_frames asks for 4" in capsys.readouterr().out
    assert main([*words, "--num-frames", "0"]) == 2
    assert "--num-frames 0: a video is at least 1 frame" in capsys.readouterr().err


def test_inspect_shows_a_video_as_its_frames(rows, data_file, golden_tokenizers, capsys):
    words = ["inspect", str(data_file(rows)), "--tokenizer", str(golden_tokenizers / "phi"), "--version", "phi"]
    assert main([*words, "--num-frames", "3", "--records", "0", "--tokens-per-image", "4"]) == 0
    out = capsys.readouterr().out
    assert "<image><image><image>\nwhat?" in out and "3 images, 12 image tokens" in out
    assert main([*words[:1], *words[2:], "--num-frames", "2", "--conversation", "<video> what?", "red"]) == 0
    assert "2 images" in capsys.readouterr().out


def test_inspect_cuts_a_video_as_training_does(rows, encoder, tokenizers, image_tree, clips):
    reads, files = encoder("phi", tokenizers["phi"], CountedImages(PATCHES)), MediaFiles(image_tree, clips, FRAMES)
    whole = views_of(reads, rows[0], "the record", files)[0].counts
    for limit in range(whole["positions"] - 20, whole["positions"]):
        [view] = views_of(reads, rows[0], "the record", files, limit)
        assert view.cut is not None
        assert (view.counts["images"], view.cut["images"]) in [(FRAMES, 0), (0, FRAMES)]
        assert view.counts["positions"] <= limit


def test_paths_that_lead_out_of_their_folder_are_refused_on_request(tmp_path):
    """`..`, absolute paths and links; what comes back in is inside, and without the flag everything is read."""
    folder, outside = tmp_path / "images", tmp_path / "outside"
    for place in (folder / "sub", outside):
        place.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(place / "a.png")
    (folder / "link.png").symlink_to(outside / "a.png")
    (folder / "inner.png").symlink_to(folder / "sub" / "a.png")
    (folder / "linked").symlink_to(outside)
    inside = ["sub/a.png", "sub/../sub/a.png", "inner.png", "../images/sub/a.png", str(folder / "sub/a.png")]
    out = ["../outside/a.png", str(outside / "a.png"), "link.png", "linked/a.png", "sub/../../outside/a.png"]
    for paths, forbidden in ((inside, False), (out, True)):
        for path in paths:
            medium = Medium("image", path)
            assert MediaFiles(folder).problem(medium) is None
            problem = MediaFiles(folder, confined=True).problem(medium)
            assert (problem is not None) == forbidden, path
            assert not forbidden or "which --confine_media forbids" in str(problem)
    with pytest.raises(DataError, match="lies outside"):
        MediaFiles(folder, confined=True).read(Medium("image", "link.png"))
    with pytest.raises(DataError, match="lies outside"):
        MediaFiles(folder, confined=True).clip(Medium("video", "../clip.mp4"))
