# SPDX-License-Identifier: Apache-2.0
"""The order of samples."""

from __future__ import annotations

import random

import pytest

from moellava.data.sampler import FILLER, GroupedSampler

# fmt: off
ORDER = [
    42, 1, 20, 53, 37, 59, 57, 8, 14, 21, 41, 16, 33, 49, 34, 13, 10, 17, 31, 18, 60, 9, 45, 48, 54, 44, 7, 27,
    22, 46, 43, 5, 28, 11, 52, 32, 12, 56, 40, 3, 6, 29, 50, 26, 51, 47, 30, 55, 25, 39, 23, 35, 2, 58, 0, 19, 4,
    36, 15, 24, 38, -1, -1, -1, -1, -1
]
# fmt: on
"""Of the first version, which sorted lists."""


@pytest.mark.parametrize("size", [0, 1, 2, 7, 64, 101])
@pytest.mark.parametrize("modality", ["both", "image", "text", "none"])
def test_every_index_comes_once(size, modality):
    generator = random.Random(size)
    lengths = [generator.randint(1, 50) for _ in range(size)]
    flags = {"both": [generator.random() < 0.6 for _ in lengths], "image": [True] * size, "text": [False] * size}
    sampler = GroupedSampler(lengths, flags.get(modality), batch_size=4, world_size=2, seed=3)
    found = list(sampler)
    assert sorted(index for index in found if index != FILLER) == list(range(size))
    assert len(sampler) == len(found) == -(-size // 8) * 8, "full batches for both ranks"


def test_a_last_step_is_shared_out_with_fillers_behind_each_share():
    sampler = GroupedSampler([1] * 9, None, batch_size=2, world_size=2, accumulation=1)
    assert [sorted(list(sampler)[-4:][rank:][:1]) != [FILLER] for rank in (0, 2)] == [True, False]
    sampler = GroupedSampler([1] * 6, None, batch_size=2, world_size=2)
    assert [index == FILLER for index in sampler] == [False] * 4 + [False, True, False, True]
    alone = GroupedSampler([1] * 7, None, batch_size=2, accumulation=2)
    assert sorted(alone) == list(range(7)), "one process has a smaller last batch"


def test_full_steps_are_of_one_modality_and_of_like_length():
    generator = random.Random(0)
    lengths = [generator.randint(1, 1000) for _ in range(400)]
    flags = [generator.random() < 0.5 for _ in lengths]
    order = list(GroupedSampler(lengths, flags, batch_size=4, world_size=2, seed=0))
    steps = [order[begin : begin + 8] for begin in range(0, 400, 8)]
    pure = [step for step in steps if len({flags[index] for index in step}) == 1]
    assert len(pure) >= len(steps) - 2
    spread = sum(max(lengths[i] for i in step) - min(lengths[i] for i in step) for step in pure) / len(pure)
    assert spread < 100, "a random order would spread by some 800"


def test_ranks_share_long_and_short_samples():
    lengths = list(range(1, 9))
    order = list(GroupedSampler(lengths, None, batch_size=4, world_size=2, seed=0))
    totals = [sum(lengths[index] for index in order[begin : begin + 4]) for begin in (0, 4)]
    assert abs(totals[0] - totals[1]) <= 4


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths, flags = [5, 5, 5, 5, 9, 9, 9, 9, 2, 2, 2, 2] * 4, [True, False] * 24

    def order(seed: int, epoch: int) -> list[int]:
        sampler = GroupedSampler(lengths, flags, batch_size=2, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0) and order(1, 5) == order(1, 5)
    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)


def test_flags_for_other_samples_are_an_error():
    with pytest.raises(ValueError, match="3 lengths but 2 modalities"):
        GroupedSampler([1, 2, 3], [True, False], batch_size=1)


def test_the_order_is_the_one_that_runs_have_begun_with():
    """A run that goes on with another version of the sampler must meet the same samples."""
    generator = random.Random(7)
    lengths = [generator.randint(1, 30) for _ in range(61)]
    flags = [generator.random() < 0.7 for _ in lengths]
    sampler = GroupedSampler(lengths, flags, batch_size=2, world_size=3, seed=11, accumulation=2)
    sampler.set_epoch(4)
    assert list(sampler) == ORDER
