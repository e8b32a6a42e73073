# SPDX-License-Identifier: Apache-2.0
"""The index of a data file: its records as they are read, in an Arrow file that all processes and workers map.

A row holds a record as JSON (or, of one that is wrong, what is wrong), the digest that skip lists know it by, a digest
of what is read of it, and the images and videos that it names. Reading a row touches no Python object that is kept, and
the pages that have been read are given back, so that neither workers nor an epoch make the memory grow.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moellava.data.digests import digest_of
from moellava.files import read_object, write_json

SOUND, TAGGED, WRONG = range(3)
"""States of a row: a record; one without images and videos whose tags are text; one with a problem in its place."""

BATCH_ROWS, BATCH_BYTES = 8192, 2**23
"""Rows and bytes that are written at once."""

READS = 4
"""Rows that are read before their pages are given back. Each brings up to a megabyte with it, where the system caches
files in pieces so large, and to give them back takes some 20 µs."""

RECORDS, FACTS = "records.arrow", "facts.json"
"""The files of an index, beside one for each of `NUMBERS`."""

NUMBERS = ("state", "digest", "said")
"""Columns of numbers, which lie in files of their own as well (`state.npy` …): in the index they stand far apart, and
who reads one from its beginning to its end would touch all of a file that may be larger than memory."""


class Row(NamedTuple):
    """A record for the index.

    Attributes:
        content: it, as JSON; of one that is wrong, a list of what messages call it and what is wrong.
        digest: of what its file says (`digest_of`).
        state: SOUND, TAGGED or WRONG.
        media: what it shows, in the order of the tags. See `place_of`.
    """

    content: bytes
    digest: int
    state: int
    media: list[str]


class FileIndex:
    """The rows of a data file.

    Args:
        content: an Arrow file's content, or the path of one.
        facts: what was found out about the whole file; JSON.
        lies: the path or the address of the file, in which pictures may lie.
    """

    def __init__(self, content: bytes | Path, facts: dict[str, Any], lies: str = ""):
        from pyarrow import ipc, py_buffer

        self._content, self.facts, self.lies = content, facts, lies
        self._map: mmap.mmap | None = None
        if isinstance(content, Path):
            with content.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._advise("MADV_RANDOM")  # a few bytes of each batch, and nothing around them
        self._table = ipc.open_file(py_buffer(content if self._map is None else self._map)).read_all()
        self.release()
        self._advise("MADV_NORMAL")
        self._records = self._table.column("content")
        self._reads = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return FileIndex, (self._content, self.facts, self.lies)

    def __len__(self) -> int:
        return self._table.num_rows

    def content(self, row: int) -> bytes:
        """Of a row; see `Row`."""
        found = self._records[row].as_py()
        self._reads += 1
        if self._reads % READS == 0:
            self.release()
        return found

    def release(self) -> None:
        """Gives back the pages that have been read. They stay in the system's cache, and count for nobody."""
        self._advise("MADV_DONTNEED")

    def _advise(self, advice: str) -> None:
        """Tells the system how the map is used, where it can be told."""
        if self._map is not None and hasattr(mmap, advice):
            self._map.madvise(getattr(mmap, advice))

    @cached_property
    def states(self) -> np.ndarray:
        """Of all rows, uint8 [N]."""
        return self._column("state")

    @cached_property
    def digests(self) -> np.ndarray:
        """What skip lists know the rows by, uint64 [N]."""
        return self._column("digest")

    @cached_property
    def said(self) -> np.ndarray:
        """Digests of the contents, uint64 [N]: what is the same here is read in the same way."""
        return self._column("said")

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of the contents, int64 [N]."""
        from pyarrow import compute

        return compute.binary_length(self._records).to_numpy().astype(np.int64)

    @property
    def media(self) -> Any:
        """What the rows show: an Arrow column of lists of texts."""
        return self._table.column("media")

    @property
    def nbytes(self) -> int:
        """Size of the index."""
        return self._table.nbytes

    def _column(self, name: str) -> np.ndarray:
        if isinstance(self._content, Path):
            return np.load(_numbers_file(self._content, name), mmap_mode="r")
        return self._table.column(name).to_numpy()

    def save_numbers(self) -> None:
        """Writes the columns of numbers to files beside that of the index."""
        assert isinstance(self._content, Path), "what lies in memory has no place beside it"
        for name in NUMBERS:
            np.save(_numbers_file(self._content, name), self._table.column(name).to_numpy())
            self.release()


def _numbers_file(records: Path, name: str) -> Path:
    return records.with_name(f"{name}.npy")


def write_index(target: Any, rows: Iterable[Row]) -> None:
    """Writes rows to a path or an Arrow stream, a batch at a time."""
    import pyarrow as arrow

    types = {
        "content": arrow.binary(),
        "digest": arrow.uint64(),
        "said": arrow.uint64(),
        "state": arrow.uint8(),
        "media": arrow.list_(arrow.string()),
    }
    schema = arrow.schema([arrow.field(name, type_, nullable=False) for name, type_ in types.items()])
    with arrow.ipc.new_file(target, schema) as writer:
        for batch in _batches(rows):
            contents, digests, states, media = zip(*batch, strict=True)
            columns = (contents, digests, list(map(digest_of, contents)), states, media)
            arrays = [arrow.array(column, type=type_) for column, type_ in zip(columns, types.values(), strict=True)]
            writer.write_batch(arrow.record_batch(arrays, schema=schema))


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.content)
        if len(batch) == BATCH_ROWS or size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def index_in_memory(rows: Iterable[Row], facts: dict[str, Any], lies: str = "") -> FileIndex:
    """An index of rows. `facts` are complete when the last row has been asked for; `lies`: see `FileIndex`."""
    import pyarrow as arrow

    sink = arrow.BufferOutputStream()
    write_index(sink, rows)
    return FileIndex(sink.getvalue().to_pybytes(), facts, lies)


def save_index(folder: Path, rows: Iterable[Row], facts: dict[str, Any]) -> None:
    """Writes an index as files. `facts` are complete when the last row has been asked for."""
    write_index(str(folder / RECORDS), rows)
    FileIndex(folder / RECORDS, {}).save_numbers()
    write_json(folder / FACTS, facts)


def open_index(folder: Path, lies: str = "") -> FileIndex:
    """What `save_index` has written, mapped; `lies`: see `FileIndex`."""
    return FileIndex(folder / RECORDS, read_object(folder / FACTS), lies)


def wrong_row(called: str, problem: str, digest: int) -> Row:
    """The row of a record that is wrong."""
    text = json.dumps([called, problem])  # in ASCII: half of a surrogate pair is no UTF-8
    return Row(text.encode(), digest, WRONG, [])
