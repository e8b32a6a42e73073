# SPDX-License-Identifier: Apache-2.0
"""The order of samples in training: batches of like length and like modality, the same for the same seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

FILLER = -1
"""What stands where a rank has no sample left in the last step of an epoch: see `blank_sample`."""


class GroupedSampler(Sampler[int]):
    """Indices such that every step of all ranks together sees samples of one modality and of like lengths.

    The samples of a step follow from the seed, the epoch, and how many a step holds (`batch_size` × `world_size` ×
    `accumulation`), not from how it is split; those of a micro-batch from `batch_size` beside that. So a run may go on
    with another number of ranks.

    Batches stand in the order in which `accelerate` deals them to ranks. What is left over of the modalities when all
    full steps are formed comes last, mixed. Each sample comes once: where the last step has too few for all ranks,
    fillers stand, on which nothing is trained; `accelerate` would repeat samples.

    Args:
        lengths: positions that each sample takes.
        modalities: whether each sample has an image; None or all alike groups by length alone.
        batch_size: samples of one rank in a micro-batch.
        world_size: ranks.
        seed: with the epoch, decides the order.
        accumulation: micro-batches of a rank in one step.
        drop_last: whether a last step that is not full is left out.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        modalities: Sequence[bool] | None,
        batch_size: int,
        world_size: int = 1,
        seed: int = 0,
        accumulation: int = 1,
        drop_last: bool = False,
    ):
        if modalities is not None and len(modalities) != len(lengths):
            raise ValueError(f"{len(lengths)} lengths but {len(modalities)} modalities")
        self.lengths = list(lengths)
        self.modalities = [True] * len(self.lengths) if modalities is None else list(modalities)
        self.batch_size = batch_size
        self.world_size = world_size
        self.seed = seed
        self.accumulation = accumulation
        self.drop_last = drop_last
        self.epoch = 0

    @property
    def step(self) -> int:
        """Samples of a step."""
        return self.batch_size * self.world_size * self.accumulation

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch's order."""
        self.epoch = epoch

    def __len__(self) -> int:
        last = 0 if self.drop_last else len(self.lengths) % self.step
        return len(self.lengths) // self.step * self.step + self._filled(last)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        steps: list[list[int]] = []
        rest: list[int] = []
        for modality in (True, False):
            members = [index for index, has_image in enumerate(self.modalities) if bool(has_image) is modality]
            steps_here, rest_here = self._steps(members, self.step, generator)
            steps += steps_here
            rest += rest_here
        for number in _permutation(len(steps), generator):
            yield from self._dealt(steps[number])
        rest.sort(key=self.lengths.__getitem__, reverse=True)
        full = len(rest) // self.step * self.step
        yield from rest[:full]
        if not self.drop_last:
            yield from self._last(rest[full:])

    def _steps(self, members: list[int], step: int, generator: torch.Generator) -> tuple[list[list[int]], list[int]]:
        """Full steps of like lengths, and the members left over. Ties of length fall out differently every epoch."""
        shuffled = [members[number] for number in _permutation(len(members), generator)]
        full = len(shuffled) // step * step
        rest, shuffled = shuffled[full:], shuffled[:full]
        shuffled.sort(key=self.lengths.__getitem__)
        return [shuffled[begin : begin + step] for begin in range(0, full, step)], rest

    def _dealt(self, step: list[int]) -> list[int]:
        """A step's indices, dealt to micro-batches so that each gets long and short ones alike."""
        longest_first = sorted(step, key=self.lengths.__getitem__, reverse=True)
        if self.lengths[longest_first[0]] == self.lengths[longest_first[-1]]:
            return step
        batches = self.step // self.batch_size
        return [index for number in range(batches) for index in longest_first[number::batches]]

    def _last(self, samples: list[int]) -> list[int]:
        """The last step, which is not full: its last micro-batch is shared out, with fillers behind each share."""
        together = self.batch_size * self.world_size
        full = len(samples) // together * together
        left = samples[full:]
        if self.world_size == 1 or not left:
            return samples
        shares = [left[rank :: self.world_size] for rank in range(self.world_size)]
        fillers = [FILLER] * self.batch_size
        return samples[:full] + [index for share in shares for index in (share + fillers)[: self.batch_size]]

    def _filled(self, samples: int) -> int:
        """Indices that `_last` makes of so many samples."""
        together = self.batch_size * self.world_size
        return samples if self.world_size == 1 else -(-samples // together) * together


def _permutation(size: int, generator: torch.Generator) -> list[int]:
    return torch.randperm(size, generator=generator).tolist()
