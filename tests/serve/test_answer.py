# SPDX-License-Identifier: Apache-2.0
"""Answers: the same alone, in a batch and as a stream; from the template of training; ended where it ends."""

from __future__ import annotations

import copy
import dataclasses

import pytest
from PIL import Image

from moellava.data import media
from moellava.data.preprocess import preprocess
from moellava.data.records import Medium
from moellava.errors import UserError
from moellava.moe import MoESpec, upcycle
from moellava.serve.answer import OpenImages, Prompts, answer, stream
from moellava.serve.generate import Sampling
from moellava.serve.prompt import Request
from moellava.vlm import VLM

QUESTION = "what colour is it?"


def of_version(vlm: VLM, version: str) -> VLM:
    """The same model with another conversation template."""
    other = dataclasses.replace(vlm, model=copy.copy(vlm.model))
    other.model.config = copy.deepcopy(vlm.model.config)
    other.settle(version)
    return other


def mixed_requests(pictures) -> list[Request]:
    """Text alone, one image, two, one in the middle of a text, an image in a later turn: all lengths differ."""
    turns = [
        {"from": "human", "value": "<image>\nwhat is it?"},
        {"from": "gpt", "value": "a picture"},
        {"from": "human", "value": "like this one <image> or not?"},
    ]
    return [
        Request("hello"),
        Request("what colour is it?", [pictures[0]]),
        Request("which of the two is larger, and which one is darker at its border?", pictures[1:]),
        Request("look at <image> and say what it is", [Image.open(pictures[2])]),
        Request(messages=turns, images=pictures[:2]),
        Request("a question without any picture that goes on for quite a while " * 3),
    ]


@pytest.mark.parametrize("batch_size", [2, 6])
def test_a_batch_answers_as_single_requests_do(composed, pictures, batch_size):
    requests = mixed_requests(pictures)
    single = [answer(composed, [request], max_new_tokens=12)[0] for request in requests]
    assert answer(composed, requests, max_new_tokens=12, batch_size=batch_size) == single
    assert len(set(single)) > 3, "answers that are all alike would show nothing"


def test_a_sparse_model_answers_in_batches_too(composed, pictures):
    sparse = dataclasses.replace(composed, model=copy.deepcopy(composed.model))
    upcycle(sparse.model, MoESpec(moe_mode="sparse", num_experts=[4], top_k_experts=2, init="noise"))
    requests = mixed_requests(pictures)
    single = [answer(sparse, [request], max_new_tokens=8)[0] for request in requests]
    assert answer(sparse, requests, max_new_tokens=8, batch_size=6) == single


def test_greedy_answers_equal_hugging_faces_generate(composed, pictures):
    request = Request(QUESTION, [pictures[0]])
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"\n{QUESTION}"}]}]
    prompt = composed.processor.apply_chat_template(messages, add_generation_prompt=True)
    with Image.open(pictures[0]) as image:
        inputs = composed.processor(text=prompt, images=image.convert("RGB"), return_tensors="pt")
    output = composed.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    expected = composed.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert answer(composed, [request], max_new_tokens=12) == [expected]


@pytest.mark.slow
def test_it_says_what_it_was_taught_and_stops_there(taught, pictures):
    requests = [Request(QUESTION, [path]) for path in pictures] + [Request("and the sky?")]
    assert answer(taught, requests, max_new_tokens=50, batch_size=4) == ["red", "green", "blue", "blue it is"]
    swapped = [Request(QUESTION, [path]) for path in reversed(pictures)]
    assert answer(taught, swapped) == ["blue", "green", "red"]


@pytest.mark.parametrize("version", ["v1", "qwen", "llama_2", "mpt", "v0"])
def test_a_prompt_is_the_beginning_of_the_training_sample(composed, version):
    question = {"from": "human", "value": f"<image>\n{QUESTION}"}
    whole = preprocess(
        [[question, {"from": "gpt", "value": "red"}]], composed.tokenizer, version=version, has_image=True
    )
    vlm = of_version(composed, version)
    request = Request(messages=[question], images=["unopened.png"])
    prompt = vlm.encoder.encode(request.record, opens=True).ids
    ids, labels = whole["input_ids"][0].tolist(), whole["labels"][0].tolist()
    assert prompt == ids[: len(prompt)]
    assert all(label == -100 for label in labels[: len(prompt)])
    assert labels[len(prompt)] != -100


def test_the_model_returns_to_training_mode(taught, pictures):
    taught.model.train()
    try:
        answer(taught, [Request(QUESTION, [pictures[0]])], max_new_tokens=2)
        assert taught.model.training
    finally:
        taught.model.eval()


def test_an_answer_ends_with_the_context(composed):
    room = composed.model.config.get_text_config().max_position_embeddings
    words = "word " * (room - 60)
    ids = Prompts(composed).example(Request(words)).ids
    said = answer(composed, [Request(words), Request("hello")], max_new_tokens=40, batch_size=2)
    assert len(ids) < room
    assert len(composed.tokenizer(said[0], add_special_tokens=False).input_ids) <= max(room - len(ids), 1) + 2
    (refused,) = answer(composed, [Request("word " * room)])
    assert refused == "" and f"reads at most {room}" in str(refused.error)


def test_mistakes_are_named(composed, pictures, tmp_path):
    with pytest.raises(UserError, match="2 images but 1 <image> tags"):
        Request("only <image> here", pictures[:2])
    with pytest.raises(UserError, match="0 images but 1"):
        Request("an <image> that is not there")
    with pytest.raises(UserError, match="either a question or messages"):
        Request()
    with pytest.raises(UserError, match="end with human"):
        Request(messages=[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}])
    with pytest.raises(UserError, match="Unknown template"):
        of_version(composed, "no-such")


def test_a_request_that_cannot_be_answered_harms_no_other(composed, pictures, tmp_path, caplog):
    """What is found when the prompt is made, and what only shows when an image is decoded in full."""
    content = bytearray(pictures[0].read_bytes())
    content[60:90] = bytes(30)
    (tmp_path / "hole.png").write_bytes(content)
    bad = [tmp_path / "missing.png", tmp_path / "hole.png"]
    requests = [Request("what?", [path]) for path in (bad[0], pictures[0], bad[1], pictures[1])]
    said = answer(composed, requests, max_new_tokens=4)
    alone = [answer(composed, [request], max_new_tokens=4)[0] for request in (requests[1], requests[3])]
    assert [said[1], said[3]] == alone and said[1].error is None
    for number, words in ((0, "no such image file"), (2, "the image cannot be read")):
        assert said[number] == "" and words in str(said[number].error)
        assert f"Request {number} is not answered: " in caplog.text


def test_half_a_character_is_named():
    with pytest.raises(UserError, match="holds half a character"):
        Request("a \udcc3")


def test_a_model_without_a_template_asks_for_one(composed):
    model, tokenizer = copy.deepcopy((composed.model, composed.tokenizer))
    vlm = dataclasses.replace(composed, model=model, tokenizer=tokenizer)
    del vlm.model.config.moellava
    vlm.tokenizer.chat_template = None
    with pytest.raises(UserError, match="--version chat_template needs a tokenizer with a chat template"):
        answer(vlm, [Request("what?")])
    vlm.settle("v1")
    assert answer(vlm, [Request("what?")], max_new_tokens=1)


def test_images_are_read_once_and_the_oldest_go_first(composed, pictures, monkeypatch):
    opened = []

    def open_image(path, *_):
        opened.append(path)
        return Image.open(path).convert("RGB").resize((40, 40))

    monkeypatch.setattr(media, "open_image", open_image)
    one_image = 3 * 40 * 40
    cache = OpenImages(limit=2 * one_image)
    red, green, blue = (Medium("image", path) for path in pictures)
    first = cache.read(red)
    assert cache.read(red) is first and len(opened) == 1
    cache.read(green)
    cache.read(red)
    cache.read(blue)  # there is room for two: the green one was not asked for lately
    assert cache.bytes == 2 * one_image
    cache.read(red)
    assert len(opened) == 3
    cache.read(green)
    assert len(opened) == 4
    assert cache.read(Medium("image", first)) is first and len(opened) == 4, "what is open already needs no file"


def test_a_batch_asks_for_each_file_once(composed, pictures, monkeypatch):
    opened, open_image = [], media.open_image
    monkeypatch.setattr(media, "open_image", lambda path, *limits: opened.append(path) or open_image(path, *limits))
    requests = [Request(question, [pictures[0]]) for question in ("what?", "which colour?", "why?")]
    answer(composed, requests, max_new_tokens=1, batch_size=2)
    assert opened == [pictures[0]]


# -- streaming -----------------------------------------------------------------------------------------------------


def test_a_stream_joins_to_the_answer(composed, taught, pictures):
    for request in mixed_requests(pictures):
        pieces = list(stream(composed, request, Sampling(max_new_tokens=12)))
        assert "".join(pieces) == answer(composed, [request], max_new_tokens=12)[0]
        assert len(pieces) > 1
    said = stream(taught, Request("and the sky?"))
    assert "".join(said) == "blue it is"


def test_a_seed_repeats_an_answer(composed):
    options = {"temperature": 1.5, "seed": 3, "max_new_tokens": 8}
    first = answer(composed, [Request("hello")], **options)
    assert answer(composed, [Request("hello")], **options) == first
    assert answer(composed, [Request("hello")], **(options | {"seed": 4})) != first


@pytest.mark.parametrize(
    "wrong",
    [
        {"question": 5},
        {"question": "a", "images": "one.png"},
        {"question": "a", "images": [None]},
        {"question": "a", "videos": [3]},
        {"question": "a", "system_prompt": "\ud83d"},
        {"messages": "abc"},
        {"messages": [{"value": "a"}]},
        {"messages": [{"from": "human", "value": 1}]},
    ],
)
def test_what_is_no_request_is_told(wrong):
    with pytest.raises(UserError, match="A request's|half a character"):
        Request(**wrong)


def test_a_batch_size_is_at_least_one(composed):
    with pytest.raises(UserError, match="batch_size is 0"):
        answer(composed, [Request("a")], batch_size=0)
