# SPDX-License-Identifier: Apache-2.0
"""Rows of Parquet and Arrow files and of data sets on disk, as JSON values; images in them become data URIs that know
their place.

What reads them is installed with `pip install 'moellava[data]'`, and imported when a file asks for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moellava.data.arrow_values import places_in_map
from moellava.data.parquet_pages import Key, Twice, key_of, places_of_group
from moellava.data.remote import open_file
from moellava.data.saved_sets import files_of_set
from moellava.data.shard_places import Held, Place, holding
from moellava.errors import DataError, UserError

ROWS = 64
"""Rows that are read together. Those with images take megabytes each."""

END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
"""What a finished stream ends with (Arrow's columnar format, 'IPC Streaming Format'). One without looks as if it
were cut between two batches."""


def parquet_rows(name: Path | str) -> Iterator[Any]:
    """The rows of a Parquet file, here or elsewhere."""
    parquet = needed("pyarrow.parquet", name)
    with table_problems(name, "Parquet"), open_file(name) as opened, holding(name) as held:
        with parquet.ParquetFile(file := Twice(opened)) as table:
            for group in range(table.num_row_groups):
                places = places_of_group(file, table.metadata, group)
                for batch in table.iter_batches(batch_size=ROWS, row_groups=[group]):
                    yield from _rows(batch, places, held)


@contextmanager
def table_problems(path: Path | str, called: str) -> Iterator[None]:
    """Raises DataError for what is wrong with a file of a format."""
    arrow = needed("pyarrow", path)
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no {called} file that can be read: {error}") from error


def arrow_rows(path: Path, inside: str = "") -> Iterator[Any]:
    """The rows of an Arrow file, or of a stream, which is how `datasets` writes them. `inside`: its name in a folder
    that is read as one, for places."""
    arrow, ipc = needed("pyarrow", path), needed("pyarrow.ipc", path)
    with table_problems(path, "Arrow"), arrow.memory_map(str(path)) as file, holding(path) as held:
        head = file.read_buffer(len(b"ARROW1"))
        is_file, memory = head.to_pybytes() == b"ARROW1", range(head.address, head.address + file.size())
        file.seek(0)
        reader = ipc.open_file(file) if is_file else ipc.open_stream(file)
        batches = (reader.get_batch(n) for n in range(reader.num_record_batches)) if is_file else reader
        for piece in (batch.slice(at, ROWS) for batch in batches for at in range(0, batch.num_rows, ROWS)):
            yield from _rows(piece, places_in_map(piece, memory, inside), held)
        if not is_file:
            _require_end(path, file)


def _require_end(path: Path, file: Any) -> None:
    """Raises DataError unless a stream that was read ends where its file does, with the mark of its end."""
    end, size = file.tell(), file.size()
    file.seek(max(end - len(END_OF_STREAM), 0))
    if file.read(len(END_OF_STREAM)) != END_OF_STREAM:
        raise DataError(f"{path} ends without Arrow's end of a stream: it was cut, or not written to its end")
    if end < size:
        raise DataError(f"{path}: more follows its end, as where two Arrow streams were joined")


def dataset_rows(path: Path) -> Iterator[Any]:
    """The rows of a folder that `datasets.save_to_disk` wrote; of one that holds splits, if there is a single one."""
    _, files = files_of_set(path, lambda name: (path / name).read_bytes())
    for file in files:
        yield from arrow_rows(path / file, file)


def needed(module: str, path: Path | str) -> Any:
    """A module that a file needs. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{path} needs the package {module.split('.')[0]}: pip install 'moellava[data]'") from error


def _rows(batch: Any, places: Mapping[Key, Place], held: Held) -> Iterator[Any]:
    """The rows of a batch. `places`: where its values of bytes lie."""
    for row in batch.to_pylist():
        yield as_json(row, lambda content: held(content, places.get(key_of(content))))


def as_json(value: Any, held: Callable[[bytes], Any]) -> Any:
    """A value of a table as JSON has it: bytes as `held` has them, and what JSON has no type for (a date) as text."""
    if isinstance(value, dict):
        return {str(key): as_json(inner, held) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner, held) for inner in value]
    if isinstance(value, bytes):
        return held(value) if value else None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
