# SPDX-License-Identifier: Apache-2.0
"""The order of samples in training: batches of like length and like modality, the same for the same seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
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

    Lengths, modalities and the order are arrays: some ten bytes a sample, where lists take a hundred.

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
        lengths: Sequence[int] | np.ndarray,
        modalities: Sequence[bool] | np.ndarray | None,
        batch_size: int,
        world_size: int = 1,
        seed: int = 0,
        accumulation: int = 1,
        drop_last: bool = False,
    ):
        if modalities is not None and len(modalities) != len(lengths):
            raise ValueError(f"{len(lengths)} lengths but {len(modalities)} modalities")
        self.lengths = np.asarray(lengths, np.int32)
        self.modalities = np.ones(len(lengths), bool) if modalities is None else np.asarray(modalities, bool)
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
        apart = [
            self._steps(np.flatnonzero(self.modalities == modality).astype(np.int32), generator)
            for modality in (True, False)
        ]
        steps, rest = (np.concatenate(parts) for parts in zip(*apart, strict=True))
        for number in _permutation(len(steps), generator):
            yield from self._dealt(steps[number]).tolist()
        rest = self._longest_first(rest)
        full = len(rest) // self.step * self.step
        yield from rest[:full].tolist()
        if not self.drop_last:
            yield from self._last(rest[full:].tolist())

    def _steps(self, members: np.ndarray, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Full steps of like lengths [steps, samples of a step], and the members left over. Ties of length fall out
        differently every epoch."""
        shuffled = members[_permutation(len(members), generator)]
        full = len(shuffled) // self.step * self.step
        shuffled, rest = shuffled[:full], shuffled[full:]
        by_length = shuffled[np.lexsort([self.lengths[shuffled]])]
        return by_length.reshape(-1, self.step), rest

    def _longest_first(self, samples: np.ndarray) -> np.ndarray:
        """Samples by their lengths; those of the same length stay in their order."""
        return samples[np.lexsort([-self.lengths[samples]])]

    def _dealt(self, step: np.ndarray) -> np.ndarray:
        """A step's indices, dealt to micro-batches so that each gets long and short ones alike."""
        longest_first = self._longest_first(step)
        if self.lengths[longest_first[0]] == self.lengths[longest_first[-1]]:
            return step
        return longest_first.reshape(self.batch_size, -1).T.reshape(-1)

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


def _permutation(size: int, generator: torch.Generator) -> np.ndarray:
    """Numbers below `size`, shuffled, int32: a Python list of them would be nine times as large."""
    return torch.randperm(size, generator=generator).numpy().astype(np.int32)
