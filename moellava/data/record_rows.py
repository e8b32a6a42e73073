# SPDX-License-Identifier: Apache-2.0
"""The values of a data file -> the rows of its index: the records as they are read, or what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from moellava.data.digests import digest_of
from moellava.data.embedded import Lying, digest_of_held, is_embedded
from moellava.data.index import SOUND, TAGGED, Row, wrong_row
from moellava.data.json_lists import Broken
from moellava.data.record_keys import brief_text
from moellava.data.record_reader import RecordReader
from moellava.data.record_shape import Medium, media_of, problem_of, tags_of, with_paths
from moellava.errors import DataError

_AS_JSON = json.JSONEncoder(ensure_ascii=False).encode

MAX_DEPTH = 64
"""Lists and objects inside each other that a record may have. Python's own limit moves with whoever reads it."""


def rows_for(values: Iterator[Any], reader: RecordReader) -> Iterator[Row]:
    """The rows of an index, of a file's values in their order."""
    for number, value in enumerate(values):
        yield _row(value, number, reader)


def _row(value: Any, number: int, reader: RecordReader) -> Row:
    is_broken = isinstance(value, Broken)
    encoded, is_deep = _encoded(value.text if is_broken else value)
    problem = value.problem if is_broken else "is nested too deeply" if is_deep else None
    if problem is None:
        try:
            record = reader.read(value)
            problem = problem_of(record)
            if problem is None:
                record = with_paths(record, lambda path: path.part if isinstance(path, Lying) else path)
                content = _AS_JSON(record).encode("utf-8")
                media = media_of(record)
                state = TAGGED if not media and tags_of(record["conversations"]) else SOUND
                return Row(content, digest_of(encoded), state, [place_of(m) for m in media])
        except UnicodeEncodeError as error:
            problem = f"has text with half of a surrogate pair, {error.object[error.start : error.end]!r}"
        except DataError as error:
            problem = str(error)
    return wrong_row(called(value, number), problem, digest_of(encoded))


def place_of(medium: Medium) -> str:
    """A medium as the row of its record has it: the first letter of its modality, and its path; of one that the record
    holds itself, a capital and its digest."""
    if is_embedded(medium.path):
        return f"{medium.modality[0].upper()}{digest_of_held(medium.path):016x}"
    return medium.modality[0] + medium.path


def _encoded(value: Any) -> tuple[bytes, bool]:
    """A value as JSON, and whether it is nested too deeply."""
    try:
        encoded = _AS_JSON(value).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"", True
    opened = encoded.count(b"[") + encoded.count(b"{")  # those in texts too, but it is a quick look
    return encoded, opened > MAX_DEPTH and _depth(value) > MAX_DEPTH


def _depth(value: Any) -> int:
    """Lists and objects inside each other."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, list | dict)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def called(value: Any, number: int) -> str:
    """How messages call a record: by its id, or else its number."""
    identity = value.get("id") if isinstance(value, dict) else None
    return str(number) if identity is None else brief_text(identity)
