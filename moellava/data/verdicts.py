# SPDX-License-Identifier: Apache-2.0
"""What became of records when they were looked at, in numbers where nothing has to be said about them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from moellava.constants import MODALITIES
from moellava.data.findings import KEY


class Verdict(NamedTuple):
    """What became of a record, or of one of its answers where each is a sample.

    Attributes:
        problems: why it cannot be trained on; any is an error.
        left_out: the count of `COUNTS` that it goes into, if it is left out without being an error.
        why: what is said about that.
        length: positions that it takes in the model.
        modalities: what it shows.
        cut: whether its end was cut.
        answer: number of the answer; None for the whole record.
    """

    problems: Sequence[str] = ()
    left_out: str | None = None
    why: str | None = None
    length: int = 0
    modalities: frozenset[str] = frozenset()
    cut: bool = False
    answer: int | None = None


WHOLE = -1
"""Stands for a whole record where the number of an answer might stand."""

DROPPED, CUT, *SHOWS = (1 << bit for bit in range(2 + len(MODALITIES)))
"""Flags of a row: left out as too long, its end cut, and one for each modality that is shown."""

ROW = np.dtype([(KEY, "<u8"), ("length", "<i4"), ("answer", "<i4"), ("flags", "u1")])
"""A verdict about which nothing has to be said. The key is its record's."""


class Judged(NamedTuple):
    """Verdicts about records.

    Attributes:
        numbers: of the records that the rows are about, in order, int64 [N].
        rows: see `ROW`; several for a record of which each answer is a sample.
        told: number of a record -> its verdicts, where something has to be said about one of them.
    """

    numbers: np.ndarray
    rows: np.ndarray
    told: dict[int, list[Verdict]]

    def only(self, chosen: np.ndarray) -> Judged:
        """With some of the rows; `chosen`: whether a row is one of them."""
        return self._replace(numbers=self.numbers[chosen], rows=self.rows[chosen])


def packed(found: Iterable[tuple[int, int, list[Verdict]]]) -> Judged:
    """Verdicts in numbers, of (number of a record, its key, its verdicts)."""
    numbers: list[int] = []
    rows: list[tuple[int, int, int, int]] = []
    told: dict[int, list[Verdict]] = {}
    for number, key, verdicts in found:
        if any(verdict.problems or verdict.why for verdict in verdicts):
            told[number] = verdicts
        else:
            numbers += [number] * len(verdicts)
            rows += [_row(key, verdict) for verdict in verdicts]
    return Judged(np.array(numbers, np.int64), np.array(rows, ROW), told)


def _row(key: int, verdict: Verdict) -> tuple[int, int, int, int]:
    flags = DROPPED * (verdict.left_out == "dropped") | CUT * verdict.cut
    for modality, flag in zip(MODALITIES, SHOWS, strict=True):
        flags |= flag * (modality in verdict.modalities)
    return key, verdict.length, WHOLE if verdict.answer is None else verdict.answer, flags


def joined(parts: Sequence[Judged]) -> Judged:
    """Verdicts in the order of their records."""
    numbers = np.concatenate([part.numbers for part in parts])
    order = np.lexsort([numbers])  # which keeps the order of equal ones
    rows = np.concatenate([part.rows for part in parts])
    told = {number: verdicts for part in parts for number, verdicts in part.told.items()}
    return Judged(numbers[order], rows[order], dict(sorted(told.items())))
