# SPDX-License-Identifier: Apache-2.0
"""Which samples a step holds: the same however it is split over processes and accumulation, also on a resume."""

from __future__ import annotations

import pytest
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from torch.utils.data import BatchSampler, DataLoader

from moellava.data.sampler import GroupedSampler

SPLITS = ((1, 8, 1), (2, 4, 1), (2, 2, 2), (4, 1, 2), (8, 1, 1))
"""(processes, samples of a process in a micro-batch, micro-batches of a step): eight samples a step."""


def steps(size: int, split: tuple[int, int, int], begin: int = 0, workers: int = 0) -> list[list[int]]:
    """The samples of each step of an epoch, as `accelerate` deals them, from a step on."""
    processes, batch, accumulation = split
    sampler = GroupedSampler([1] * size, None, batch * accumulation, processes, seed=3)
    sampler.set_epoch(1)
    dealt = []
    for rank in range(processes):
        batches = BatchSamplerShard(BatchSampler(sampler, batch, drop_last=False), processes, rank)
        loader = DataLoader(range(size), batch_sampler=batches, num_workers=workers, collate_fn=list)
        dealt.append(list(skip_first_batches(loader, begin * accumulation)))
    micro = [sum(batches, []) for batches in zip(*dealt, strict=True)]
    return [sorted(sum(micro[n : n + accumulation], [])) for n in range(0, len(micro), accumulation)]


@pytest.mark.parametrize("split", SPLITS)
def test_a_step_holds_the_same_samples_however_it_is_split(split):
    found = steps(96, split)
    assert found == steps(96, SPLITS[0]) and sorted(sum(found, [])) == list(range(96))
    assert steps(96, split, begin=5) == steps(96, SPLITS[0])[5:]


@pytest.mark.parametrize("split", SPLITS)
def test_every_sample_comes_once_and_a_last_step_is_filled_up(split):
    found = steps(93, split)
    assert sorted(set(sum(found, []))) == list(range(93)) and len(sum(found[:-1], [])) == len(set(sum(found[:-1], [])))
    assert set(sum(found, [])) == set(range(93)) and len(sum(found, [])) - 93 < 8


def test_workers_change_nothing():
    assert steps(24, (2, 2, 2), workers=2) == steps(24, (1, 8, 1))
