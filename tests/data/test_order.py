# SPDX-License-Identifier: Apache-2.0
"""Which samples a step holds: the same however it is split over processes and accumulation, also on a resume."""

from __future__ import annotations

import pytest
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from torch.utils.data import BatchSampler, DataLoader, Dataset

from moellava.data.sampler import FILLER, GroupedSampler

SPLITS = ((1, 8, 1), (2, 4, 1), (2, 2, 2), (4, 1, 2), (8, 1, 1))
"""(processes, samples of a process in a micro-batch, micro-batches of a step): eight samples a step."""


def steps(
    size: int, split: tuple[int, int, int], begin: int = 0, workers: int = 0, grouped: bool = False, **options: bool
) -> list[list[int]]:
    """The samples of each step of an epoch, as `accelerate` deals them, from a step on."""
    processes, batch, accumulation = split
    lengths, shows = ([index * 7 % 31 for index in range(size)], [index % 3 > 0 for index in range(size)])
    shown = (lengths, shows) if grouped else ([1] * size, None)
    sampler = GroupedSampler(*shown, batch, processes, seed=3, accumulation=accumulation, **options)
    sampler.set_epoch(1)
    assert len(list(sampler)) == len(sampler)
    dealt = []
    for rank in range(processes):
        batches = BatchSampler(sampler, batch, drop_last=False)
        if processes > 1:
            batches = BatchSamplerShard(batches, processes, rank)
        loader = DataLoader(Numbers(), batch_sampler=batches, num_workers=workers, collate_fn=list)
        dealt.append(list(skip_first_batches(loader, begin * accumulation)))
    micro = [sum(batches, []) for batches in zip(*dealt, strict=True)]
    return [
        sorted(index for index in sum(micro[n : n + accumulation], []) if index != FILLER)
        for n in range(0, len(micro), accumulation)
    ]


class Numbers(Dataset):
    """A data set whose samples are their indices."""

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_a_step_holds_the_same_samples_however_it_is_split(split, grouped):
    for size in (96, 93, 89):
        found = steps(size, split, grouped=grouped)
        assert found == steps(size, SPLITS[0], grouped=grouped) and sorted(sum(found, [])) == list(range(size))
        assert steps(size, split, begin=5, grouped=grouped) == found[5:]


@pytest.mark.parametrize("split", SPLITS)
def test_a_last_step_that_is_not_full_may_be_left_out(split):
    found = steps(93, split, drop_last=True)
    assert found == steps(93, SPLITS[0])[:-1]


def test_workers_change_nothing():
    assert steps(24, (2, 2, 2), workers=2) == steps(24, (1, 8, 1))
