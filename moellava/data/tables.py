# SPDX-License-Identifier: Apache-2.0
"""Rows of Parquet and Arrow files and of data sets on disk, as JSON values; images in them become data URIs.

What reads them is installed with `pip install 'moellava[data]'`, and imported when a file asks for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moellava.data.embedded import data_uri
from moellava.errors import DataError, UserError

ROWS = 64
"""Rows that are read together. Those with images take megabytes each."""


def parquet_rows(path: Path) -> Iterator[Any]:
    """The rows of a Parquet file."""
    parquet = needed("pyarrow.parquet", path)
    with table_problems(path, "Parquet"), parquet.ParquetFile(path) as file:
        yield from _rows(file.iter_batches(batch_size=ROWS))


def rows_of_group(table: Any, group: int, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a row group of a Parquet file that is open, as pyarrow has them; `columns`: None for all."""
    for batch in table.iter_batches(batch_size=ROWS, row_groups=[group], columns=columns):
        yield from batch.to_pylist()


@contextmanager
def table_problems(path: Path | str, called: str) -> Iterator[None]:
    """Raises DataError for what is wrong with a file of a format."""
    arrow = needed("pyarrow", path)
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no {called} file that can be read: {error}") from error


def arrow_rows(path: Path) -> Iterator[Any]:
    """The rows of an Arrow file, or of a stream, which is how `datasets` writes them."""
    arrow, ipc = needed("pyarrow", path), needed("pyarrow.ipc", path)
    with table_problems(path, "Arrow"), arrow.memory_map(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = ipc.open_file(file) if is_file else ipc.open_stream(file)
        batches = (reader.get_batch(n) for n in range(reader.num_record_batches)) if is_file else reader
        yield from _rows(piece.slice(at, ROWS) for piece in batches for at in range(0, piece.num_rows, ROWS))


def dataset_rows(path: Path) -> Iterator[Any]:
    """The rows of a folder that `datasets.save_to_disk` wrote; of one that holds splits, if there is a single one."""
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise DataError(f"{path} is a folder, but no data set that `datasets` has saved to disk: name the files in it")
    datasets, arrow = needed("datasets", path), needed("pyarrow", path)
    try:
        found = datasets.load_from_disk(str(path))
    except (arrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no data set that can be read: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        if len(found) != 1:
            raise DataError(f"{path} holds the splits {', '.join(found)}: name the folder of one of them")
        (found,) = found.values()
    yield from _rows(found.with_format("arrow").iter(batch_size=ROWS))


def needed(module: str, path: Path | str) -> Any:
    """A module that a file needs. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{path} needs the package {module.split('.')[0]}: pip install 'moellava[data]'") from error


def _rows(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        yield from map(as_json, batch.to_pylist())


def as_json(value: Any, held: Callable[[bytes], Any] = data_uri) -> Any:
    """A value of a table as JSON has it: bytes as `held` has them, and what JSON has no type for (a date) as text."""
    if isinstance(value, dict):
        return {str(key): as_json(inner, held) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner, held) for inner in value]
    if isinstance(value, bytes):
        return held(value) if value else None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
