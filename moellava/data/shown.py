# SPDX-License-Identifier: Apache-2.0
"""The images and videos of many records, each once, without a Python object for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from moellava.constants import MODALITIES
from moellava.data.digests import digest_of
from moellava.data.findings import Findings
from moellava.data.media import MediaFiles, place_of, threaded
from moellava.data.records import Medium, Records
from moellava.data.remote import RemoteFolder

_MODALITY = {modality[0]: modality for modality in MODALITIES}

SLICE = 8192
"""Media that are Python objects at the same time."""


class Shown:
    """The distinct media of records, in the order in which they first come.

    Attributes:
        modality: of each, its place in `MODALITIES` [M].
        in_file: whether each lies in a file, not in its record [M].
        counts: media of each record [N].
        which: the numbers of the media of all records, one record behind the other [sum of `counts`].
    """

    def __init__(self, records: Records):
        import pyarrow as arrow
        from pyarrow import compute

        columns = [part.held.media.take(arrow.array(part.rows)) for part in records.chosen]
        lists = arrow.chunked_array([chunk for column in columns for chunk in column.chunks], arrow.list_(arrow.utf8()))
        texts = compute.list_flatten(lists).dictionary_encode().unify_dictionaries()
        self._distinct = texts.chunk(0).dictionary if texts.num_chunks else arrow.array([], arrow.utf8())
        first = compute.utf8_slice_codeunits(self._distinct, 0, 1)
        letters = np.frombuffer("".join(first.to_pylist()).encode("ascii"), np.uint8)
        self.in_file = letters >= ord("a")
        self.modality = np.select([letters | 32 == ord(letter) for letter in _MODALITY], list(range(len(_MODALITY))))
        self.counts = compute.list_value_length(lists).to_numpy().astype(np.int64)
        self.which = np.concatenate([np.empty(0, np.int32), *(chunk.indices.to_numpy() for chunk in texts.chunks)])

    def __len__(self) -> int:
        return len(self._distinct)

    def slices(self, numbers: np.ndarray) -> Iterator[tuple[int, list[Medium]]]:
        """Media that lie in files, by their numbers: where a slice of these begins, and its media."""
        import pyarrow as arrow

        for begin in range(0, len(numbers), SLICE):
            texts = self._distinct.take(arrow.array(numbers[begin : begin + SLICE])).to_pylist()
            yield begin, [Medium(_MODALITY[text[0]], text[1:]) for text in texts]

    def embedded(self) -> np.ndarray:
        """The digests of those that their records hold themselves, uint64, in their order."""
        import pyarrow as arrow

        texts = self._distinct.take(arrow.array(np.flatnonzero(~self.in_file))).to_pylist()
        return np.array([int(text[1:], 16) for text in texts], np.uint64)

    def files(self) -> Iterator[Medium]:
        """All that lie in files."""
        return (medium for _, media in self.slices(np.flatnonzero(self.in_file)) for medium in media)

    @property
    def _begins(self) -> np.ndarray:
        return np.cumsum(self.counts) - self.counts

    def any_of(self, chosen: np.ndarray) -> np.ndarray:
        """Whether each record shows any of some media [N]. `chosen`: whether a medium is one of them [M]."""
        before = np.concatenate([[0], np.cumsum(chosen[self.which])])
        return before[self._begins + self.counts] > before[self._begins]

    def mixed(self, numbers: np.ndarray) -> np.ndarray:
        """For each record one number of those of its media and their order, uint64 [N]; 0 for one without media."""
        places = np.arange(len(self.which)) - np.repeat(self._begins, self.counts)
        each = scattered(numbers[self.which] + scattered(places.astype(np.uint64)))
        before = np.concatenate([np.zeros(1, np.uint64), np.cumsum(each, dtype=np.uint64)])
        return before[self._begins + self.counts] - before[self._begins]


def scattered(numbers: np.ndarray) -> np.ndarray:
    """Numbers, uint64 [N], each bit of which depends on all bits of one (the finalizer of splitmix64); 0 of 0."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def states_of(media: Sequence[Medium], files: MediaFiles) -> np.ndarray:
    """For each medium a digest of where its file lies, how large it is and when it was changed, uint64 [N]; 0 where
    there is none. A file with the same number has the same content, as far as anybody can tell without reading it."""
    folders = {name: files.folder_of(name) for name in MODALITIES}
    roots = {name: place_of(folder) for name, folder in folders.items()}
    found = (
        _state(os.path.join(roots[name], path))
        if isinstance(folders[name], Path) or os.path.isabs(path)
        else cast(RemoteFolder, folders[name]).state(path) or 0
        for name, path in media
    )
    return np.fromiter(found, np.uint64, len(media))


def looked_up(
    media: Sequence[Medium], files: MediaFiles, kept: Findings, field: str, look: Callable[[Any], Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What was found out about files, by the states that they are in; what is not kept is looked at now.

    Args:
        media: that lie in files [N].
        kept: at most one row for a state.
        field: of its rows.
        look: (where a file lies) -> what the field holds of it.

    Returns:
        States [N] (see `states_of`), values of the field [N], and which of them are new.
    """
    states = states_of(media, files)
    counts, rows = kept.known(states)
    values = np.zeros(len(media), rows.dtype[field])
    values[counts > 0] = rows[field]
    new = np.flatnonzero(counts == 0)
    values[new] = threaded(look, [files.file_of(media[place]) for place in new.tolist()])
    return states, values, new


def _state(path: str) -> int:
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return 0
    return digest_of(f"{path}\0{state.st_size}\0{state.st_mtime_ns}".encode("utf-8", "surrogateescape"))
