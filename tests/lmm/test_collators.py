# SPDX-License-Identifier: Apache-2.0
"""Records of released models as batches: the ids are the processor's own, and only answers and terminators train."""

import pickle

import pytest
import torch
from PIL import Image

from moellava.constants import IGNORE_INDEX
from moellava.data.render.chat import parts_of_text
from moellava.errors import DataError, UserError
from moellava.lmm.architecture import ARCHITECTURES
from moellava.lmm.datasets import TO_LOAD_IMAGE
from moellava.vlm import collator_of
from tests.lmm.conftest import RECORDS
from tests.lmm.tiny import NATIVE, TINY, batch_of


@pytest.mark.parametrize("family_id", [name for name in NATIVE if name != "paligemma"])
def test_a_batch_is_what_the_processor_makes_of_the_rendered_text(family_id, samples_of, opened, pictures):
    """Every tensor of the model's own processor, given the text that its template renders.

    PaliGemma's wants the answer apart from the text: see test_family_collators.py.
    """
    record = {
        "id": "one",
        "image": ["0.png", "1.png"],
        "conversations": [
            {"from": "human", "value": "<image>\n<image>\nWhat is it?"},
            {"from": "gpt", "value": "A fractal."},
        ],
    }
    dataset = samples_of(family_id, [record])
    batch = batch_of(family_id, dataset, 0)
    processor = opened(family_id).processor
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is it?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "A fractal."}]},
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    images = [Image.open(path).convert("RGB") for path in pictures[:2]]
    bos = processor.tokenizer.bos_token
    expected = processor(
        text=[text],
        images=[images],
        return_tensors="pt",
        add_special_tokens=not (bos and text.startswith(bos)),
    )
    assert set(batch) == set(expected) | {"labels"}
    for name, value in expected.items():
        torch.testing.assert_close(batch[name], value, rtol=0, atol=0, msg=name)
    assert dataset.lengths == [batch["input_ids"].shape[1]]
    assert dataset.shows_media == [True]


@pytest.mark.parametrize("family_id", NATIVE)
def test_only_answers_and_their_terminators_train(family_id, samples_of):
    dataset = samples_of(family_id)
    tokenizer = dataset.encoder.tokenizer
    end = TINY[family_id].end
    batch = batch_of(family_id, dataset, 0, 1, 2)
    decoded = [tokenizer.decode(row[row != IGNORE_INDEX]) for row in batch["labels"]]
    assert [text.replace(" ", "") for text in decoded] == [
        f"Afractal.{end}Yes,no</s>andno<image>.{end}",
        f"Thesecond.{end}",
        f"Hello.{end}",
    ]
    trained = batch["labels"] != IGNORE_INDEX
    assert torch.equal(batch["labels"][trained], batch["input_ids"][trained])
    ends = batch["labels"][0] == tokenizer.convert_tokens_to_ids(end)
    assert int(ends.sum()) == 2, "a terminator that is only typed is none"


@pytest.mark.parametrize("family_id", ["llava-1.5", "qwen2-vl", "gemma3"])
def test_a_batch_without_images_runs_the_tower_and_changes_nothing(family_id, samples_of, opened):
    dataset, model = samples_of(family_id), opened(family_id).model
    tokenizer = dataset.encoder.tokenizer
    batch = batch_of(family_id, dataset, 2)
    assert len(batch["pixel_values"])
    loss = model(**batch).loss
    model.zero_grad()
    loss.backward()
    towers = [p for name, p in model.named_parameters() if "vision" in name or "visual" in name]
    assert any(p.grad is not None for p in towers), "every rank has a gradient for the tower, if only of zeros"
    assert all(p.grad is None or not p.grad.any() for p in towers)
    ids = dataset[2]["input_ids"][None]
    with torch.no_grad():
        alone = model(input_ids=ids, labels=dataset[2]["labels"][None], attention_mask=torch.ones_like(ids)).loss
    torch.testing.assert_close(loss.detach(), alone, rtol=1e-5, atol=1e-6)
    assert tokenizer.pad_token_id is not None


@pytest.mark.parametrize("family_id", ["llava-1.5", "qwen2-vl", "gemma3"])
def test_a_padded_batch_computes_what_its_rows_compute_alone(family_id, samples_of, opened):
    dataset, model = samples_of(family_id), opened(family_id).model
    together = batch_of(family_id, dataset, 0, 1, 2)
    with torch.no_grad():
        logits = model(**together).logits
        for row in range(3):
            batch = batch_of(family_id, dataset, row)
            alone = model(**batch).logits[0, batch["attention_mask"][0].bool()]
            torch.testing.assert_close(logits[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_questions_train_when_asked_but_never_media_or_padding(samples_of):
    dataset = samples_of("qwen2-vl")
    batch = batch_of("qwen2-vl", dataset, 0, 1, 2, train_questions=True)
    trained = batch["labels"] != IGNORE_INDEX
    media = batch["input_ids"] == dataset.encoder.reader.placeholder_id
    assert torch.equal(trained, batch["attention_mask"].bool() & ~media)


def test_a_system_prompt_opens_its_conversation(samples_of):
    dataset = samples_of("qwen2-vl")
    decode = dataset.encoder.tokenizer.decode
    texts = [decode([token for token in sample["input_ids"].tolist() if token >= 0]) for sample in dataset]
    assert texts[1].startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert texts[0].startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>")


def test_images_stand_where_the_template_puts_them(make_record, opened):
    """Qwen2-VL keeps the order of a question; LLaVA-1.5 shows images first."""
    texts, question = {}, "First <image> then <image> say"
    for family_id in ("qwen2-vl", "llava-1.5"):
        pieces = opened(family_id).encoder.pieces(make_record("1", question, "ok", image=["0.png", "1.png"]))
        texts[family_id] = "".join(piece.text for piece in pieces)
    shown = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"First {shown} then {shown} say<|im_end|>" in texts["qwen2-vl"]
    assert "USER: <image>\n<image>\nFirst  then  say ASSISTANT: ok</s>" in texts["llava-1.5"]


def test_line_breaks_that_set_an_image_off_are_the_templates_business():
    assert parts_of_text("<image>\nWhat?", True) == [("image", ""), ("text", "What?")]
    assert parts_of_text("a\nb <image> c", True) == [("text", "a\nb "), ("image", ""), ("text", " c")]
    assert parts_of_text("<image>\nWhat?", False) == [("text", "<image>\nWhat?")]


def test_an_overlong_record_is_cut_but_never_inside_an_image(samples_of):
    """Of two turns the second is cut; of the interleaved record no answer is left, so it is dropped and counted."""
    whole = samples_of("llava-1.6").lengths
    dataset = samples_of("llava-1.6", overlong="truncate", max_length=whole[0] - 1)
    assert dataset.lengths == [whole[0] - 1, whole[2]]
    assert (dataset.report()["truncated"], dataset.report()["dropped"]) == (1, 1)
    batch = batch_of("llava-1.6", dataset, 0, 1)
    assert batch["input_ids"].shape[1] == whole[0] - 1
    inside = samples_of("llava-1.6", overlong="truncate", max_length=whole[2])
    assert inside.lengths == [whole[2]], "a cut inside the image leaves nothing to train on"
    assert samples_of("llava-1.6", overlong="drop", max_length=whole[0]).report()["dropped"] == 1
    with pytest.raises(DataError, match=f"Record interleaved .* takes {whole[1]} positions"):
        samples_of("llava-1.6", overlong="error", max_length=whole[0])


def test_what_cannot_be_masked_or_shown_is_named(samples_of, opened):
    template = opened("llava-1.5").processor.chat_template
    with pytest.raises(UserError, match="not prefix-stable"):
        samples_of("llava-1.5", template="{{ messages | length }}" + template)
    with pytest.raises(UserError, match="leaves out, repeats or reorders the texts"):
        samples_of("llava-1.5", template=template.replace("== 'text' %}", "== 'text' %}{{ part['text'] }}"))
    wrong = [{"id": "x", "system_prompt": 3, "conversations": [{"from": "human", "value": "a"}]}]
    with pytest.raises(DataError, match='Record x of .* has a "system_prompt" that is no text: 3'):
        samples_of("llava-1.5", wrong)
    silent = [{"id": "y", "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "a"}]}]
    assert len(samples_of("llava-1.5", silent)) == 1, "an empty question is a record like any other"


def test_architectures_that_read_paths_get_paths(samples_of, pictures):
    assert TO_LOAD_IMAGE["qwen-vl"] is False and TO_LOAD_IMAGE["llava-1.5"] is True
    dataset = samples_of("llava-1.5", loads_images=False)
    assert dataset[0]["media"] == [pictures[0]]


@pytest.mark.parametrize("family_id", TINY)
def test_workers_that_are_spawned_get_all_that_they_need(family_id, samples_of, small_opened, clips):
    """Data set and collator are pickled for a worker that does not inherit them: macOS, and Python from 3.14 on."""
    clip = {
        "id": "clip",
        "video": "shapes.mp4",
        "conversations": [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "Shapes."}],
    }
    shown = [clip] if ARCHITECTURES[family_id].video else []
    vlm = small_opened(family_id)
    dataset = samples_of(family_id, [*RECORDS, *shown], vlm=vlm, video_folder=clips, num_frames=2)
    collator = collator_of(dataset.encoder, ARCHITECTURES[family_id])
    sent, put_together = pickle.loads(pickle.dumps((dataset, collator)))
    for numbers in ([0, 2], list(range(3, len(dataset)))):
        if numbers:
            wanted, found = (
                collate([one[number] for number in numbers])
                for collate, one in ((collator, dataset), (put_together, sent))
            )
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], value) for name, value in wanted.items() if torch.is_tensor(value))
