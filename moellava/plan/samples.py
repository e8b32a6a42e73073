# SPDX-License-Identifier: Apache-2.0
"""The samples of a run, and the micro-batches that are made of them: the largest one, and one as most are.

    lengths of the samples looked at    9 5 4 2        of two samples a micro-batch
    largest, in one row                 9+5            largest, padded      9 9
                                                                            9 9
    typical, in one row                 5              typical, padded      as long as the longer of two is on average

Memory has to hold the largest; how many tokens a second there are is decided by the typical one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moellava.constants import IGNORE_INDEX
from moellava.data.places import Places, places_of


@dataclass(frozen=True)
class Batch:
    """What one process sees in a forward: B rows, all alike.

    Args:
        samples: B.
        length: L, positions of a row, media and padding counted.
        supervised: positions of a row that are trained on.
        images: of all rows.
        parts: positions of each sample, where they lie end to end in a single row; else a row is a sample.
        padding: positions at the end of a row that are no tokens.
    """

    samples: int
    length: int
    supervised: int
    images: int = 0
    parts: tuple[int, ...] = ()
    padding: int = 0

    @property
    def positions(self) -> int:
        """Of all rows."""
        return self.samples * self.length

    def told(self) -> tuple[Tensor, Places, Tensor | None]:
        """What a batch of training says beside its media: labels [B, L], its places, and, where samples share a row,
        positions within them [B, L]."""
        shape = (self.samples, self.length)
        labels, mask = torch.full(shape, IGNORE_INDEX), torch.ones(shape, dtype=torch.long)
        labels[:, 1 : self.supervised + 1] = 0
        mask[:, self.length - self.padding :] = 0
        positions = None
        if self.parts:
            each = [*self.parts, self.padding]
            positions = torch.cat([torch.arange(part) for part in each]).view(shape)
        return labels, places_of(labels, mask, positions), positions


class Sample(NamedTuple):
    """A sample, or a row that `--packing` filled with several.

    Args:
        parts: positions of each sample.
        supervised: positions of all that are trained on.
        images: of all.
    """

    parts: tuple[int, ...]
    supervised: int
    images: int = 0

    @property
    def length(self) -> int:
        """Positions of all."""
        return sum(self.parts)


@dataclass(frozen=True)
class Samples:
    """What a run's micro-batches are made of.

    Args:
        found: samples, one at least; of more than these a micro-batch has the same ones again.
        blank: positions that a blank image adds to a micro-batch that shows nothing.
    """

    found: tuple[Sample, ...]
    blank: int = 0

    @property
    def longest(self) -> Batch:
        """One sample that has the most of everything."""
        most = self._most(1)
        return Batch(1, most.length, most.supervised, most.images)

    @property
    def mean_length(self) -> float:
        """Positions of a sample."""
        return self._mean("length")

    @property
    def uniform(self) -> Samples:
        """The same with all samples as the longest."""
        return Samples((self._most(1),), self.blank)

    def largest(self, count: int, in_one_row: bool) -> Batch:
        """The largest micro-batch of so many samples.

        Args:
            in_one_row: whether they lie end to end; else every row is as long as the longest.
        """
        one, most = self._most(1), self._most(count)
        blank = 0 if one.images else self.blank
        if in_one_row:
            return Batch(1, most.length + blank, most.supervised, most.images or int(blank > 0), most.parts, blank)
        width = max(one.length, self._longest(count)[-1].length + blank)  # the shortest row has the room for it
        return Batch(count, width, one.supervised, count * one.images or int(blank > 0))

    def times(self, count: int, in_one_row: bool) -> float:
        """How many of the longest sample have as much of everything as the largest micro-batch of so many."""
        if not in_one_row:
            return count
        one, most = self._most(1), self._most(count)
        return max(getattr(most, name) / max(getattr(one, name), 1) for name in MOST)

    def typical(self, count: int, in_one_row: bool) -> Batch:
        """A row of one sample that is as most are, padded as much as it would be among so many."""
        length, supervised, images = (round(self._mean(name)) for name in MOST)
        width = length if in_one_row else max(round(self._mean_longest(count)), length)
        several = round(sum(len(sample.parts) for sample in self.found) / len(self.found))
        parts = tuple(length // several + (part < length % several) for part in range(several))
        shares = in_one_row and several > 1
        supervised = min(max(supervised, 1), length)
        return Batch(1, width, supervised, images, parts if shares else (), width - length)

    def _longest(self, count: int) -> list[Sample]:
        ordered = sorted(self.found, key=lambda sample: sample.length, reverse=True)
        return [ordered[number % len(ordered)] for number in range(count)]

    def _most(self, count: int) -> Sample:
        """So many samples as one: the longest, with what the most supervised and the most illustrated have."""
        parts = tuple(part for sample in self._longest(count) for part in sample.parts)
        sums = []
        for name in MOST[1:]:
            values = sorted((getattr(sample, name) for sample in self.found), reverse=True)
            sums.append(sum(values[number % len(values)] for number in range(count)))
        return Sample(parts, *sums)

    def _mean(self, name: str) -> float:
        return sum(getattr(sample, name) for sample in self.found) / len(self.found)

    def _mean_longest(self, count: int) -> float:
        """Mean length of the longest of so many samples that are drawn at random."""
        lengths = sorted(sample.length for sample in self.found)
        below = [(number / len(lengths)) ** count for number in range(len(lengths) + 1)]
        return sum(length * (below[rank + 1] - below[rank]) for rank, length in enumerate(lengths))


MOST = ("length", "supervised", "images")
"""What a sample has more or less of."""
