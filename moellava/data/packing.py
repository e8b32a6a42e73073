# SPDX-License-Identifier: Apache-2.0
"""Several samples in one row of a batch, so that little of it is padding.

Those of a batch may share a single row, which changes nothing but its shape; or rows are filled before there are
batches (`--packing True`). Which samples share a row of these is drawn once for a run, by its seed, so that every epoch
has the same number of rows and a resumed run finds the same ones; the sampler then shuffles rows as it shuffles
samples. The collator has positions begin at 0 in each sample, which is what transformers' masks tell samples apart by.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from moellava.data.collate import BEGINS, RECORDS, UNREADABLE
from moellava.data.sampler import FILLER

WINDOW = 4096
"""Samples among which those that fill a row are looked for."""


def packed_rows(
    lengths: Sequence[int], capacity: int, seed: int = 0, groups: Sequence[object] | None = None
) -> list[list[int]]:
    """The samples of each row, every sample once; the same for the same seed.

    Best fit, the longest first, among `WINDOW` samples at a time of a shuffled order.

    Args:
        lengths: positions that each sample takes. One that is longer than a row has a row of its own.
        capacity: positions of a row.
        seed: of the order.
        groups: what the samples of a row must have in common; None: nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    rows: list[list[int]] = []
    for group in [None] if groups is None else sorted(set(groups), key=repr):
        members = order if groups is None else [index for index in order if groups[index] == group]
        for begin in range(0, len(members), WINDOW):
            rows += _best_fit(members[begin : begin + WINDOW], lengths, capacity)
    return rows


def _best_fit(members: list[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free positions, number of the row), by free positions
    for index in sorted(members, key=lengths.__getitem__, reverse=True):
        place = bisect_left(room, (lengths[index], 0))
        if place == len(room):
            rows.append([])
            free, number = capacity, len(rows) - 1
        else:
            free, number = room.pop(place)
        rows[number].append(index)
        insort(room, (free - lengths[index], number))
    return rows


def joined(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Samples as one, with the indices under `BEGINS` at which each of them begins, and their names under `RECORDS`.

    Each may hold several itself. What stands for no record at all is left out, unless there is nothing else.
    """
    shown = [sample for sample in samples if sample["record"]] or [samples[0]]
    row: dict[str, Any] = {name: torch.cat([sample[name] for sample in shown]) for name in ("input_ids", "labels")}
    row["media"] = [medium for sample in shown for medium in sample["media"]]
    row["record"] = ", ".join(sample["record"] for sample in shown)
    row[RECORDS] = [name for sample in shown for name in sample.get(RECORDS, [sample["record"]])]
    offsets = accumulate((len(sample["input_ids"]) for sample in shown), initial=0)
    row[BEGINS] = [o + b for o, sample in zip(offsets, shown, strict=False) for b in sample.get(BEGINS, [0])]
    unreadable = {number: why for sample in samples for number, why in sample.get(UNREADABLE, {}).items()}
    return row | ({UNREADABLE: unreadable} if unreadable else {})


class Batches:
    """What a data set has that hands out the samples of a batch together.

    Attributes:
        in_one_row: as a single one, end to end, without padding between them.
    """

    in_one_row = False

    def fetch_ahead(self, indices: Iterable[int]) -> None:
        """Fetches what lies elsewhere of these samples, side by side, for whoever asks for them next."""

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The samples of a batch, for torch's `DataLoader`. Raises BadFileError."""
        self.fetch_ahead(indices)
        samples = [self[index] for index in indices]  # type: ignore[index]
        return [joined(samples)] if self.in_one_row else samples


class Ragged(Sequence[list[int]]):
    """Lists of numbers, in two arrays: workers that look at them copy nothing of them, as they would of Python's lists,
    which count who looks at them."""

    def __init__(self, rows: Sequence[Sequence[int]]):
        counts = np.fromiter(map(len, rows), np.int64, len(rows))
        self.ends = np.cumsum(counts)
        self.begins = self.ends - counts
        self.numbers = np.fromiter(chain.from_iterable(rows), np.int32, int(counts.sum()))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> list[int]:  # type: ignore[override]  # slices are of no use here
        return self.numbers[self.begins[index] : self.ends[index]].tolist()


class PackedDataset(Batches, Dataset):
    """A data set whose samples are the rows of another one's.

    Args:
        dataset: a `SupervisedDataset`.
        rows: of `packed_rows`; none of them empty.
        capacity: positions of a row.
    """

    def __init__(self, dataset: Any, rows: list[list[int]], capacity: int):
        self.dataset = dataset
        self.rows = Ragged(rows)
        self.capacity = capacity

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`. Raises BadFileError."""
        return joined([self.dataset[number] for number in ([FILLER] if index == FILLER else self.rows[index])])

    def fetch_ahead(self, indices: Iterable[int]) -> None:
        """See `Batches`."""
        self.dataset.fetch_ahead(number for index in indices if index != FILLER for number in self.rows[index])

    def __getattr__(self, name: str) -> Any:
        """What is asked of the samples: `report`, `leave_out`, `unreadable`, `modalities`, `records`."""
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    @property
    def lengths(self) -> list[int]:
        """Positions that each row takes."""
        return self.positions.tolist()

    @property
    def shows_media(self) -> list[bool]:
        """Whether each row has an image or a video."""
        return self.with_media.tolist()

    @property
    def positions(self) -> np.ndarray:
        """The lengths as an array, int32 [N]."""
        return np.add.reduceat(self.dataset.positions[self.rows.numbers], self.rows.begins)

    @property
    def with_media(self) -> np.ndarray:
        """`shows_media` as an array, bool [N]."""
        return np.logical_or.reduceat(self.dataset.with_media[self.rows.numbers], self.rows.begins)

    def __str__(self) -> str:
        filled = int(self.positions.sum()) / (len(self) * self.capacity)
        return (
            f"{len(self.dataset)} samples in {len(self)} rows of up to {self.capacity} positions, "
            f"{len(self.dataset) / len(self):.1f} a row, {filled:.0%} full"
        )


def packed(dataset: Any, capacity: int, seed: int, by_modality: bool = False) -> PackedDataset:
    """A data set in rows of at most so many positions; `by_modality`: no row has samples with media and without."""
    rows = packed_rows(dataset.lengths, capacity, seed, dataset.shows_media if by_modality else None)
    return PackedDataset(dataset, rows, capacity)
