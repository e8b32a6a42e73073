# SPDX-License-Identifier: Apache-2.0
"""Batches: padding, the tokens of images and videos, and what is blank where nothing is shown."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from moellava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moellava.data.collate import MediaCollator
from moellava.data.media_reader import Media, MediaReader, Run, blank, modality_of

PAD, IMAGE, PATCHES = 0, 77, 3


class Paints(MediaReader):
    """A reader without a processor: an image is 3 tokens, 77 each, and its pixels are its red."""

    is_one_input = False

    def __init__(self) -> None:
        pass

    def read(self, samples, name="the batch") -> Media:
        runs = [[Run([IMAGE] * PATCHES, {})] * len(row) for row in samples]
        return Media(
            runs, {"pixel_values": torch.tensor([image.getpixel((0, 0))[0] for row in samples for image in row])}
        )


def sample(ids: list[int], trained: int = 1, name: str = "Record 1 of x.json") -> dict:
    """A sample that is trained on its last tokens; its images have 1, 2, … of red."""
    labels = [IGNORE_INDEX] * (len(ids) - trained) + ids[len(ids) - trained :]
    images = [Image.new("RGB", (8, 6), (1 + number, 0, 0)) for number in range(ids.count(IMAGE_TOKEN_INDEX))]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "media": images, "record": name}


@pytest.fixture
def collator() -> MediaCollator:
    return MediaCollator(Paints(), PAD)


def test_images_become_tokens_and_rows_are_padded_on_the_right(collator):
    batch = collator([sample([1, -200, 5]), sample([1, 5])])
    assert batch["input_ids"].tolist() == [[1, IMAGE, IMAGE, IMAGE, 5], [1, 5, PAD, PAD, PAD]]
    assert batch["labels"].tolist() == [[-100, -100, -100, -100, 5], [-100, 5, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch["pixel_values"].tolist() == [1]


def test_several_images_keep_their_order(collator):
    batch = collator([sample([-200, 4, -200]), sample([5]), sample([-200, 9])])
    assert batch["pixel_values"].tolist() == [1, 2, 1]
    assert (batch["input_ids"] == IMAGE).sum(1).tolist() == [6, 0, 3]


@pytest.mark.parametrize("lengths", [(4,), (4, 1), (1, 6), (2, 2)])
def test_a_batch_that_shows_nothing_carries_a_blank_image_in_its_padding(collator, lengths):
    batch = collator([sample([5] * length) for length in lengths])
    is_image = batch["input_ids"] == IMAGE
    assert int(is_image.sum()) == PATCHES
    assert batch["pixel_values"].tolist() == [0], "black"
    assert not batch["attention_mask"][is_image].any() and (batch["labels"][is_image] == IGNORE_INDEX).all()
    assert batch["attention_mask"].sum(1).tolist() == list(lengths)
    assert batch["input_ids"].shape[1] <= max(max(lengths), min(lengths) + PATCHES)


def test_prompts_are_padded_on_the_left_and_nothing_blank_is_in_them(collator):
    prompts = collator.of_prompts()
    batch = prompts([sample([1, 5]), sample([1, -200, 5])])
    assert batch["input_ids"].tolist() == [[PAD, PAD, PAD, 1, 5], [1, IMAGE, IMAGE, IMAGE, 5]]
    assert batch["attention_mask"].tolist() == [[0, 0, 0, 1, 1], [1] * 5]
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
    assert set(prompts([sample([1, 5])])) == {"input_ids", "attention_mask"}
    assert prompts([sample([4], trained=0)])["input_ids"].tolist() == [[4]]
    assert "labels" in collator([sample([1, 5])]), "the collator of the samples stays as it is"


def test_a_wrong_number_of_images_names_the_record(collator):
    bad = sample([-200, 5], name="Record 8123 of ft.json")
    bad["media"] *= 2
    with pytest.raises(ValueError, match="Record 8123 of ft.json has 1 placeholders but 2 media"):
        collator([sample([1]), bad])


def test_questions_are_trained_on_by_request(collator):
    rows = [sample([1, -200, 5, 6]), sample([7, 8])]
    batch = MediaCollator(collator.reader, PAD, train_questions=True)(rows)
    assert batch["labels"].tolist() == [[1, -100, -100, -100, 5, 6], [7, 8, -100, -100, -100, -100]]
    assert batch["input_ids"].tolist() == collator(rows)["input_ids"].tolist()


def test_numbers_for_each_token_are_padded_with_zeros(collator, monkeypatch):
    """Gemma 3 and Qwen3-VL are told of each token whether it is an image's."""

    def with_types(samples, name):
        runs = [[Run([IMAGE] * PATCHES, {"token_type_ids": [1, 2, 1]})] * len(row) for row in samples]
        return Media(runs, {"pixel_values": torch.zeros(sum(map(len, samples)))})

    monkeypatch.setattr(collator.reader, "read", with_types)
    rows = [sample([1, -200, 5]), sample([1, 5])]
    assert collator(rows)["token_type_ids"].tolist() == [[0, 1, 2, 1, 0], [0, 0, 0, 0, 0]]
    assert collator.of_prompts()(rows)["token_type_ids"].tolist() == [[0, 1, 2, 1, 0], [0, 0, 0, 0, 0]]
    assert collator([sample([1, 5])])["token_type_ids"].tolist() == [[0, 0, 1, 2, 1]]


def test_every_modality_that_is_asked_for_is_in_the_batch(collator, monkeypatch):
    """A model with an encoder of its own for videos runs both in every step, whatever the batch shows."""
    tokens = {"image": [IMAGE] * PATCHES, "video": [88, 88]}

    def both(samples, name):
        shown = [modality_of(medium) for row in samples for medium in row]
        runs = [[Run(tokens[modality_of(medium)], {}) for medium in row] for row in samples]
        return Media(runs, {"seen": torch.tensor([len(tokens[modality]) for modality in shown])})

    monkeypatch.setattr(collator.reader, "read", both)
    collator.modalities = ("image", "video")
    batch = collator([sample([1, -200, 5]), sample([1, 5])])
    assert batch["input_ids"].tolist() == [[1, IMAGE, IMAGE, IMAGE, 5], [1, 5, PAD, 88, 88]]
    assert batch["attention_mask"][1].tolist() == [1, 1, 0, 0, 0] and batch["seen"].tolist() == [3, 2]
    nothing = collator([sample([1, 5])])
    assert nothing["input_ids"].tolist() == [[1, 5, IMAGE, IMAGE, IMAGE, 88, 88]]
    clip = {**sample([1, -201, 5]), "media": [blank("video")]}
    assert collator([clip])["input_ids"].tolist() == [[1, 88, 88, 5, IMAGE, IMAGE, IMAGE]]
    collator.reader.is_one_input = True
    assert collator([clip])["input_ids"].tolist() == [[1, 88, 88, 5]], "one pass of one encoder sees both"


def test_pixels_are_those_of_the_models_processor(reader):
    rows = [sample([1, -200, 5, -200]), sample([1, 5]), sample([-200, 5])]
    batch = MediaCollator(reader, PAD)(rows)
    images = [image for row in rows for image in row["media"]]
    wanted = reader.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], wanted) and wanted.shape == (3, 3, 32, 32)
    assert (batch["input_ids"] == reader.placeholder_id).sum(1).tolist() == [8, 0, 4]
    black = MediaCollator(reader, PAD)([sample([1, 5])])["pixel_values"]
    assert torch.equal(black, reader.read([[blank("image")]]).tensors["pixel_values"])
