# SPDX-License-Identifier: Apache-2.0
"""Features of pictures on disk: files of many pictures each, mapped into memory, which processes and runs share.

    features [R, P, D]   what a tower gave: R pictures or tiles, P patches (and class tokens), D numbers of each
    keys     [N]         which pictures they are of; picture n has the rows from begins[n] up to begins[n + 1]
    sizes    [N, 2]      width and height of each in pixels

A file is written aside and moved to its place when it is complete, under a name of its keys, so that what a run that
is killed has finished stays, and several processes write beside each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moellava.files import written

FILE_BYTES = 2**28
"""Features that are held in memory until a file of them is written."""

ENDING = ".safetensors"


class FeatureStore:
    """The features in a folder.

    Args:
        folder: of one tower and its settings; it is made.

    Attributes:
        keys: of all pictures, sorted, uint64 [N].
        waiting_bytes: of features that are not written yet.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._waiting: list[tuple[int, tuple[int, int], torch.Tensor]] = []
        self.waiting_bytes = 0
        self.reopen()

    def __getstate__(self) -> dict[str, Any]:
        """Without open files: a worker opens its own."""
        return self.__dict__ | {"_open": {}}

    def __len__(self) -> int:
        return len(self.keys)

    def reopen(self) -> None:
        """Looks at what lies in the folder by now."""
        self._files = sorted(self.folder.glob(f"*{ENDING}"))
        self._open: dict[int, Any] = {}
        tables = [self._table(number) for number in range(len(self._files))]
        keys, places, sizes = (np.concatenate(column) for column in zip(_EMPTY, *tables, strict=True))
        self.keys, first = np.unique(keys, return_index=True)  # two runs may have computed the same at a time
        self._places, self._sizes = places[first], sizes[first]

    def place(self, key: int) -> int | None:
        """Where a picture stands among all; None: it is not here."""
        place = int(np.searchsorted(self.keys, np.uint64(key)))
        return place if place < len(self.keys) and int(self.keys[place]) == key else None

    def size(self, place: int) -> tuple[int, int]:
        """Width and height in pixels."""
        wide, high = self._sizes[place].tolist()
        return wide, high

    def features(self, place: int) -> torch.Tensor:
        """Of one picture, [rows, P, D]."""
        file, begin, end = self._places[place].tolist()
        return self._file(file).get_slice("features")[begin:end]

    def add(self, key: int, size: tuple[int, int], features: torch.Tensor) -> None:
        """Keeps the features [rows, P, D] of a picture; `flush` writes those that still wait."""
        self._waiting.append((key, size, features))
        self.waiting_bytes += features.nbytes
        if self.waiting_bytes >= FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what waits."""
        if not self._waiting:
            return
        keys, sizes, features = zip(*self._waiting, strict=True)
        tensors = {
            "features": torch.cat(features),
            "keys": torch.from_numpy(np.array(keys, np.uint64).view(np.int64)),
            "sizes": torch.tensor(sizes, dtype=torch.int32),
            "begins": torch.tensor([0, *np.cumsum([len(one) for one in features])]),
        }
        name = hashlib.sha256(tensors["keys"].numpy().tobytes()).hexdigest()[:32]
        with written(self.folder / f"{name}{ENDING}") as temporary:
            save_file(tensors, temporary)
        self._waiting, self.waiting_bytes = [], 0

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(file.stat().st_size for file in self._files)

    def _file(self, number: int) -> Any:
        if number not in self._open:
            self._open[number] = safe_open(self._files[number], framework="pt")
        return self._open[number]

    def _table(self, number: int) -> Sequence[np.ndarray]:
        """Keys [N], places [N, 3] and sizes [N, 2] of a file's pictures."""
        with safe_open(self._files[number], framework="pt") as file:
            keys, begins, sizes = (file.get_tensor(name).numpy() for name in ("keys", "begins", "sizes"))
        places = np.stack([np.full(len(keys), number), begins[:-1], begins[1:]], axis=1)
        return keys.view(np.uint64), places, sizes


_EMPTY = (np.empty(0, np.uint64), np.empty((0, 3), np.int64), np.empty((0, 2), np.int32))
