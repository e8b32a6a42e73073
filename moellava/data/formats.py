# SPDX-License-Identifier: Apache-2.0
"""Data files of any format -> their records, one by one, as JSON values.

A format is an entry of `FORMATS`: how it is recognised (by the first bytes of a file, by its name, or as a folder) and
how it is read. Text may be packed (gzip, bzip2, xz) and may carry a byte order mark.
"""

from __future__ import annotations

import codecs
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from moellava.data.json_lists import Broken, decoded, listed, parsed
from moellava.data.record_keys import brief_text
from moellava.data.shards import is_shard, shard_rows
from moellava.data.tables import arrow_rows, dataset_rows, parquet_rows
from moellava.data.unpacking import unpacked
from moellava.errors import DataError
from moellava.files import IS_FOLDER, NO_FILE, file_problem

HEAD = 512
"""Bytes at a file's beginning that tell its format."""

MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order mark -> encoding. The longer marks go first: UTF-16's begins UTF-32's."""


class FileFormat(NamedTuple):
    """A format of data files.

    Attributes:
        name: for messages and the documentation.
        fits: (path, first bytes) -> whether a file or folder is one.
        read: path -> its records; a `Broken` for one that cannot be read. Raises DataError for the whole file.
    """

    name: str
    fits: Callable[[Path, bytes], bool]
    read: Callable[[Path], Iterator[Any]]


def rows_of(path: str | Path) -> Iterator[Any]:
    """The records of a data file or folder, in its order: JSON values, or `Broken`.

    Raises:
        DataError: the file is missing, cannot be read, or is of no format that is known; also on the way.
    """
    path = Path(path)
    if problem := missing(path):
        raise DataError(problem)
    try:
        head = b"" if _is_folder(path) else _head(path)
        chosen = next(format_ for format_ in FORMATS if format_.fits(path, head))
        yield from chosen.read(path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def missing(path: str | Path) -> str | None:
    """Why there is no data file, or folder, at a path; None: there is one. Nothing of it is read."""
    problem = file_problem(path)
    if problem is None or problem == IS_FOLDER:
        return None
    return f"{brief_text(str(path))}: {'no such data file' if problem == NO_FILE else problem}"


def _is_folder(path: Path) -> bool:
    return file_problem(path) == IS_FOLDER


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """A file of text, unpacked, in UTF-8 or what its byte order mark says. Line breaks are as they stand."""
    with path.open("rb") as packed, unpacked(packed) as file:
        head = file.peek(HEAD)[:HEAD]
        encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8")
        yield io.TextIOWrapper(file, encoding=encoding, newline="\n")


def _json_rows(path: Path) -> Iterator[Any]:
    """JSON in any wrapping: a list, one object, objects one a line, or objects one after another.

    A list, and objects one a line, are read as they come, however large the file; the others as a whole.
    """
    try:
        with _opened(path) as file:
            first = _first_line(file)
            if first.startswith("[") and not _says_lines(path):
                file.seek(0)
                yield from _listed(path, file)
            elif _is_whole(first):
                rest = _filled(file)
                second = next(rest, None)
                if second is None and not _says_lines(path):
                    yield _one(path, parsed(first))
                else:
                    file.seek(0)
                    yield from _lines(file)
            else:
                file.seek(0)
                yield from _joined_rows(path, file.read().strip())
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _first_line(file: TextIO) -> str:
    """The first line that is not empty; of a list its first characters, since all of it may be one line."""
    while (head := file.readline(HEAD)) and not head.strip():
        pass
    if head.lstrip().startswith("[") or head.endswith("\n"):
        return head.strip()
    return (head + file.readline()).strip()


def _filled(file: Iterable[str]) -> Iterator[str]:
    return (line for line in file if line.strip())


def _listed(path: Path, file: TextIO) -> Iterator[Any]:
    """The values of a file that is one list. Raises DataError where it breaks off or something follows."""
    try:
        yield from listed(file)
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error


def _joined_rows(path: Path, text: str) -> Iterator[Any]:
    """The values of a text that begins with no whole line."""
    if not text:
        raise DataError(f"{path} is empty")
    try:
        values = list(_values(text))
    except ValueError as error:
        if _says_lines(path) or (text.startswith("{") and any(map(_is_whole, text.split("\n")))):
            return _lines(text.split("\n"))
        known = "" if text[0] in "[{" else f". Data files are {', '.join(one.name for one in FORMATS)}"
        raise DataError(f"{path} is not valid JSON: {error}{known}") from error
    if len(values) == 1 and isinstance(values[0], list):
        return iter(values[0])
    return iter([_one(path, values[0])] if len(values) == 1 else values)


def _says_lines(path: Path) -> bool:
    return bool({".jsonl", ".ndjson"} & set(path.suffixes))


def _is_whole(line: str) -> bool:
    """Whether a line is an object, which begins in its first column."""
    try:
        return line.startswith("{") and isinstance(parsed(line), dict)
    except ValueError:
        return False


def _one(path: Path, value: Any) -> Any:
    """The only value of a file, if it is a record. Raises DataError for another."""
    if not (isinstance(value, dict) and any(isinstance(column, list) for column in value.values())):
        shown = f" (its keys: {brief_text(', '.join(value) or 'none')})" if isinstance(value, dict) else ""
        raise DataError(f"{path} holds a JSON {type(value).__name__}, not a list of records{shown}")
    return value


def _values(text: str) -> Iterator[Any]:
    """JSON values one after another. Raises ValueError where one is broken."""
    place = 0
    while place < len(text):
        value, place = decoded(text, place)
        yield value
        while place < len(text) and text[place].isspace():
            place += 1


def _lines(lines: Iterable[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield parsed(line)
            except ValueError as error:
                yield Broken(f"is not valid JSON (line {number}): {error}", line.rstrip("\n"))


def _is_arrow(path: Path, head: bytes) -> bool:
    return head.startswith(b"ARROW1") or (path.suffix == ".arrow" and head.startswith(b"\xff\xff\xff\xff"))


FORMATS = (
    FileFormat("a data set of `datasets.save_to_disk`", lambda path, head: _is_folder(path), dataset_rows),
    FileFormat("Parquet", lambda path, head: head.startswith(b"PAR1"), parquet_rows),
    FileFormat("Arrow", _is_arrow, arrow_rows),
    FileFormat("a WebDataset shard", is_shard, shard_rows),
    FileFormat("JSON or JSON Lines", lambda path, head: True, _json_rows),
)
"""The first that fits reads a file. A mixture (`mixtures.py`) is a list of such files."""
