# SPDX-License-Identifier: Apache-2.0
"""What the training answers say about an image, and the records made from them."""

from __future__ import annotations

import json

import easy_vqa
import pytest

from moellava.data.records import load_records
from moellava.demo.easy_vqa_data import (
    Facts,
    TrainImage,
    caption_records,
    conversation_records,
    train_images,
    true_words,
    write_records,
)


@pytest.fixture(scope="module")
def images() -> list[TrainImage]:
    return train_images()


@pytest.mark.parametrize(
    ("question", "answer", "words"),
    [
        ("what color is the circle?", "red", {"circle", "red"}),
        ("what shape is in the image?", "circle", {"circle"}),
        ("is there a red shape?", "yes", {"red"}),
        ("is there a red shape?", "no", set()),
        ("is no red shape present?", "no", {"red"}),
        ("does the image not contain a circle?", "yes", set()),
    ],
)
def test_true_words(question, answer, words):
    assert true_words(question, answer) & {"red", "circle"} == words


@pytest.mark.parametrize(
    ("facts", "caption"),
    [
        (Facts("red", "circle"), "a red circle"),
        (Facts(color="red"), "a red shape"),
        (Facts(shape="circle"), "a circle"),
        (Facts(), None),
    ],
)
def test_captions_say_what_is_known(facts, caption):
    assert facts.caption == caption


def test_the_split_is_the_published_one(images):
    assert len(images) == 4000
    assert sum(len(image.turns) for image in images) == 38575
    assert all(image.path.parent.parent.name == "train" for image in images)


def test_the_test_split_is_never_opened(monkeypatch):
    def refuse(*_):
        raise AssertionError("the test split was read")

    for name in ("get_test_questions", "get_test_image_paths"):
        monkeypatch.setattr(easy_vqa, name, refuse)
    images = train_images()
    assert caption_records(images, 1)
    assert conversation_records(images, 1, seed=0)


def test_contradicting_answers_are_refused():
    image = TrainImage(0, None, (("what color is the shape?", "red"), ("what color is the shape?", "blue")))
    with pytest.raises(ValueError, match=r"contradict.*blue.*red"):
        _ = image.facts


def test_a_conversation_holds_each_question_of_its_image_once(images):
    records = conversation_records(images[:50], copies=2, seed=0)
    assert len(records) == 100
    assert len({record["id"] for record in records}) == 100
    for image, record in zip(images[:50] * 2, records, strict=True):
        values = [turn["value"] for turn in record["conversations"]]
        assert values[0].startswith("<image>\n")
        asked = zip(values[::2], values[1::2], strict=True)
        assert sorted((q.removeprefix("<image>\n"), a) for q, a in asked) == sorted(image.turns)
    assert records[0]["conversations"] != records[50]["conversations"]


def test_records_are_read_as_llava_json(images, tmp_path):
    write_records(caption_records(images[:20], 1) + conversation_records(images[:20], 1, seed=0), tmp_path / "d.json")
    assert isinstance(json.loads((tmp_path / "d.json").read_text()), list)
    assert len(load_records([str(tmp_path / "d.json")])) >= 39
