# SPDX-License-Identifier: Apache-2.0
"""The order of samples in training: batches of like length and like modality, the same for the same seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class GroupedSampler(Sampler[int]):
    """Indices such that every step of all ranks together sees samples of one modality and of like lengths.

    The indices of a step stand together, rank after rank, `batch_size` of each: the order in which `accelerate` deals
    batches to ranks. What is left over of the modalities when all full steps are formed comes last, mixed.

    Args:
        lengths: positions that each sample takes.
        modalities: whether each sample has an image; None or all alike groups by length alone.
        batch_size: samples of one rank in one step.
        world_size: ranks.
        seed: with the epoch, decides the order.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        modalities: Sequence[bool] | None,
        batch_size: int,
        world_size: int = 1,
        seed: int = 0,
    ):
        if modalities is not None and len(modalities) != len(lengths):
            raise ValueError(f"{len(lengths)} lengths but {len(modalities)} modalities")
        self.lengths = list(lengths)
        self.modalities = [True] * len(self.lengths) if modalities is None else list(modalities)
        self.batch_size = batch_size
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch's order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        step = self.batch_size * self.world_size
        steps: list[list[int]] = []
        rest: list[int] = []
        for modality in (True, False):
            members = [index for index, has_image in enumerate(self.modalities) if bool(has_image) is modality]
            steps_here, rest_here = self._steps(members, step, generator)
            steps += steps_here
            rest += rest_here
        for number in _permutation(len(steps), generator):
            yield from self._dealt(steps[number])
        rest.sort(key=self.lengths.__getitem__, reverse=True)
        yield from rest

    def _steps(self, members: list[int], step: int, generator: torch.Generator) -> tuple[list[list[int]], list[int]]:
        """Full steps of like lengths, and the members left over. Ties of length fall out differently every epoch."""
        shuffled = [members[number] for number in _permutation(len(members), generator)]
        full = len(shuffled) // step * step
        rest, shuffled = shuffled[full:], shuffled[:full]
        shuffled.sort(key=self.lengths.__getitem__)
        return [shuffled[begin : begin + step] for begin in range(0, full, step)], rest

    def _dealt(self, step: list[int]) -> list[int]:
        """A step's indices, dealt to ranks so that each gets long and short ones alike."""
        longest_first = sorted(step, key=self.lengths.__getitem__, reverse=True)
        return [index for rank in range(self.world_size) for index in longest_first[rank :: self.world_size]]


def _permutation(size: int, generator: torch.Generator) -> list[int]:
    return torch.randperm(size, generator=generator).tolist()
