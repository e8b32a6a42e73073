# SPDX-License-Identifier: Apache-2.0
"""Which samples share a row, and what the batch of such rows is."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch

from moellava.data.collate import PLACES, MediaCollator
from moellava.data.packing import PackedDataset, Ragged, joined, packed, packed_rows
from tests.data.test_collate import IMAGE, PAD, Paints, sample


@pytest.mark.parametrize("size", [0, 1, 7, 5000])
def test_every_sample_is_in_one_row_that_holds_it(size):
    generator = random.Random(size)
    lengths = [generator.randint(1, 60) for _ in range(size)]
    rows = packed_rows(lengths, 64, seed=3)
    assert sorted(index for row in rows for index in row) == list(range(size))
    assert all(sum(lengths[index] for index in row) <= 64 for row in rows)
    assert sum(lengths) >= 0.95 * 64 * len(rows) or size < 100
    assert rows == packed_rows(lengths, 64, seed=3)
    assert size < 100 or rows != packed_rows(lengths, 64, seed=4)


def test_a_sample_that_is_longer_than_a_row_stands_alone():
    assert sorted(map(sorted, packed_rows([9, 2, 2], 4))) == [[0], [1, 2]]


def test_groups_do_not_share_rows():
    groups = [number % 3 == 0 for number in range(60)]
    rows = packed_rows([3] * 60, 30, groups=groups)
    assert {len({groups[index] for index in row}) for row in rows} == {1}


class Samples(list):
    """A data set without records."""

    lengths = property(lambda self: [len(one["input_ids"]) for one in self])
    shows_media = property(lambda self: [bool(one["media"]) for one in self])
    positions = property(lambda self: np.array(self.lengths, np.int32))
    with_media = property(lambda self: np.array(self.shows_media))
    unreadable = {3: "torn"}


def test_rows_are_samples_of_another_data_set():
    dataset = Samples([sample([1, 5]), sample([1, -200, 5]), sample([2, 2, 2, 2]), sample([1, 5])])
    rows = packed(dataset, capacity=5, seed=0)
    assert sorted(rows.lengths) == [2, 4, 5] and sum(rows.shows_media) == 1 and rows.unreadable == {3: "torn"}
    assert str(rows) == "4 samples in 3 rows of up to 5 positions, 1.3 a row, 73% full"
    assert not any(len(set(map(dataset.shows_media.__getitem__, row))) > 1 for row in packed(dataset, 5, 0, True).rows)


def test_rows_are_kept_in_arrays():
    rows = packed_rows([3, 2, 4, 1, 1], 5)
    kept = Ragged(rows)
    assert list(kept) == rows and len(kept) == len(rows) and kept[-1] == rows[-1]
    assert (kept.numbers.dtype, kept.numbers.nbytes + kept.ends.nbytes) == (np.int32, 5 * 4 + len(rows) * 8)
    with pytest.raises(IndexError):
        kept[len(rows)]


@pytest.fixture
def collator() -> MediaCollator:
    collator = MediaCollator(Paints(), PAD)
    collator.is_told = True
    return collator


def test_positions_begin_anew_with_each_sample_and_with_padding(collator):
    rows = [joined([sample([1, 5], 2), sample([1, -200, 5], 1), sample([6, 7], 2)]), joined([sample([8, -200, 9], 1)])]
    batch = collator(rows)
    assert batch["input_ids"].tolist() == [[1, 5, 1, *[IMAGE] * 3, 5, 6, 7], [8, *[IMAGE] * 3, 9, *[PAD] * 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert batch["labels"][0].tolist() == [-100, 5, *[-100] * 4, 5, -100, 7], "another sample would predict a 6"
    assert batch["attention_mask"].tolist() == [[1] * 9, [1] * 5 + [0] * 4]
    assert batch["pixel_values"].tolist() == [1, 1]
    places = batch[PLACES]
    assert places["supervised"].tolist() == [0, 5, 7, 12] and places["real"].tolist() == list(range(14))
    assert places["sequence"].tolist() == [0, 0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3]
    assert places["is_packed"] and places["n_sequences"] == 5


def test_rows_of_one_sample_are_not_packed(collator):
    batch = collator([sample([1, 5]), sample([1, -200, 5])])
    assert "position_ids" not in batch
    places = batch[PLACES]
    assert places["sequence"].tolist() == [0, 0, 1, 1, 1, 1, 1] and not places["is_packed"]
    assert places["real"].tolist() == [0, 1, 5, 6, 7, 8, 9] and places["supervised"].tolist() == [0, 8]
    assert places["n_sequences"] == 2


def test_a_blank_image_is_a_stranger_in_a_packed_row(collator):
    batch = collator([joined([sample([1, 5]), sample([6, 7])])])
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7, IMAGE, IMAGE, IMAGE]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 0, 1, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0]]


def test_questions_are_trained_on_in_packed_rows_too(collator):
    collator.train_questions = True
    blank = sample([0], 0, "Record 2") | {"unreadable": {7: "torn"}}
    row = joined([sample([1, 5, 6]), blank, sample([7, 8, 9])])
    batch = collator([row])
    assert batch["labels"].tolist() == [[-100, 5, 6, -100, -100, 8, 9, -100, -100, -100]]
    assert batch["unreadable"] == {7: "torn"}, "what stands for a record that cannot be shown is left out, and named"
    alone = collator([joined([blank, blank])])
    assert alone["labels"].eq(-100).all() and alone["input_ids"][0, 0] == 0


def test_a_data_set_can_be_copied_to_workers():
    rows = PackedDataset(Samples([sample([1, 5])]), [[0]], 4)
    assert torch.equal(pickle.loads(pickle.dumps(rows))[0]["input_ids"], torch.tensor([1, 5]))
