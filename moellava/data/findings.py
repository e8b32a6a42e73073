# SPDX-License-Identifier: Apache-2.0
"""What was found out about records and files, as rows of numbers under 64-bit keys, kept for the next run.

A key is a digest of all that decides over a finding, so that a finding never goes stale: what has changed has another
key. Of ten million keys, two are the same by chance in one case of 400,000.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moellava.data.cache import cache_folder, locked
from moellava.files import written
from moellava.log import get_logger

KEPT_FROM = 1000
"""Findings that are worth a file."""

FOLDER = "findings"

KEY = "key"
"""The field of a row that holds its key."""


class Findings:
    """Rows by key, sorted; several of the same key stay in their order.

    Args:
        name: of their file: what they are about, and what decides over all of them.
        dtype: of a row; one field is `KEY`, uint64.
        place: the folder of the cache; None: nothing is kept.
    """

    def __init__(self, name: str, dtype: np.dtype, place: Path | None):
        self.dtype = dtype
        self._place, self._name = place, f"{FOLDER}/{name}"
        self._rows = self._read()

    def known(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of keys [N]: how many each has [N], and the rows themselves, in the order of the keys."""
        begin = np.searchsorted(self._rows[KEY], keys, "left")
        counts = np.searchsorted(self._rows[KEY], keys, "right") - begin
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return counts, self._rows[np.repeat(begin, counts) + within]

    def add(self, rows: np.ndarray) -> None:
        """Keeps rows of new keys, if they are many, or some are kept already."""
        if self._place is None or not len(rows) or len(rows) + len(self._rows) < KEPT_FROM:
            return
        try:
            with locked(self._place, self._name, f"writing {self._name}"):
                self._rows = self._read()  # another process may have added to it
                self._rows = self._joined(rows[~np.isin(rows[KEY], self._rows[KEY])])
                self._file.parent.mkdir(exist_ok=True)
                with written(self._file) as temporary, temporary.open("wb") as file:
                    np.save(file, self._rows)
        except OSError as error:
            get_logger(__name__).warning("%s cannot be written (%s): it is found out anew", self._file, error.strerror)

    @property
    def _file(self) -> Path:
        return Path(self._place or "") / f"{self._name}.npy"

    def _read(self) -> np.ndarray:
        if self._place is None or not self._file.is_file():
            return np.empty(0, self.dtype)
        rows = np.load(self._file, mmap_mode="r")
        return rows if rows.dtype == self.dtype else np.empty(0, self.dtype)

    def _joined(self, rows: np.ndarray) -> np.ndarray:
        joined = np.concatenate([self._rows, rows])
        return joined[np.lexsort([joined[KEY]])]


def findings(about: str, decides: Callable[[], Any], dtype: np.dtype, count: int) -> Findings:
    """Findings about so many things: kept where they are many.

    Args:
        about: what they are about.
        decides: gives what decides over all of them, as JSON; asked for where they are kept.
        dtype: see `Findings`.
        count: of the things.
    """
    place = cache_folder() if count >= KEPT_FROM else None
    if place is None:
        return Findings(about, dtype, None)
    digest = hashlib.sha256(json.dumps(decides()).encode()).hexdigest()[:32]
    return Findings(f"{about}-{digest}", dtype, place)
