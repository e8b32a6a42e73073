# SPDX-License-Identifier: Apache-2.0
"""Records of data files, by their indexes. All that is wrong with the files is found in one pass.

A record is `{"id", "image": path | [path, …], "conversations": [{"from": "human" | "gpt", "value": text}, …]}`, where
"video" may stand beside "image" or in its place, "system_prompt" beside them, and `"train": false` in an answer that is
not trained on. Whatever files call it (`record_keys.py`), and whatever format they have (`formats.py`), here it is so.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moellava.constants import MODALITIES, ROLES
from moellava.data.cache import cache_folder, remembered
from moellava.data.index import TAGGED, WRONG, FileIndex
from moellava.data.indexing import DIGESTS, KEPT_FROM, index_of
from moellava.data.mixtures import listing_of, taken
from moellava.data.record_keys import brief_text
from moellava.data.record_reader import RecordReader
from moellava.data.record_rows import called
from moellava.data.record_shape import (
    MEDIA_TAG,
    Medium,
    Source,
    media_of,
    paths_of,
    problem_of_turns,
    shows_media,
    tags_of,
    trained_answers,
)
from moellava.data.remote import is_remote
from moellava.data.shard_parts import with_address, with_pictures
from moellava.data.skip_lists import SkipList, key_of, read_skip_list
from moellava.errors import DataError
from moellava.log import get_logger

__all__ = [
    "MEDIA_TAG",
    "MODALITIES",
    "ROLES",
    "Chosen",
    "Medium",
    "Problem",
    "Records",
    "Source",
    "load_records",
    "media_of",
    "paths_of",
    "problem_of_turns",
    "read_records",
    "shows_media",
    "tags_of",
    "trained_answers",
]
"""Beside records of files, what a record is (`record_shape.py`)."""


class Problem(NamedTuple):
    """Something wrong with a data file.

    Attributes:
        key: of the record, as a skip list has it; None where the whole file is meant.
        text: the message, which names file and record.
    """

    key: str | None
    text: str


class Chosen(NamedTuple):
    """Records of a data file.

    Attributes:
        file: as it was named.
        held: the index of the file.
        rows: sound ones of it, int32 [N].
    """

    file: str
    held: FileIndex
    rows: np.ndarray


class Records(Sequence[dict[str, Any]]):
    """Records of data files, parsed when asked for. Processes and workers share them: see `FileIndex`.

    Attributes:
        chosen: where they lie, in their order.
        skipped: records left out because a skip list names them.
        notices: what was read and means nothing, a line each, for whoever reads the files to say.
    """

    def __init__(self) -> None:
        self.chosen: list[Chosen] = []
        self._begins = [0]
        self.skipped = 0
        self.notices: list[str] = []

    def add(self, chosen: Chosen) -> None:
        """Adds records of a file."""
        if len(chosen.rows):
            self.chosen.append(chosen)
            self._begins.append(self._begins[-1] + len(chosen.rows))

    def picked(self, numbers: Sequence[int]) -> Records:
        """Some of them, in the order of `numbers`."""
        some = Records()
        for index in numbers:
            part = bisect_right(self._begins, index) - 1
            place = index - self._begins[part]
            some.add(self.chosen[part]._replace(rows=self.chosen[part].rows[place : place + 1]))
        return some

    def __len__(self) -> int:
        return self._begins[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]  # slices are of no use here
        chosen, row = self._place(index)
        return with_address(json.loads(chosen.held.content(row)), chosen.held.lies)

    def _place(self, index: int) -> tuple[Chosen, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index %= len(self)
        part = bisect_right(self._begins, index) - 1
        return self.chosen[part], int(self.chosen[part].rows[index - self._begins[part]])

    def name(self, index: int) -> str:
        """How messages call a record: by its id, or else its number, and its file."""
        chosen, row = self._place(index)
        return _name(called(json.loads(chosen.held.content(row)), row), chosen.file)

    def key(self, index: int) -> str:
        """How a skip list calls a record."""
        chosen, row = self._place(index)
        return str(key_of(chosen.file, row, int(chosen.held.digests[row])))

    @property
    def lie_elsewhere(self) -> bool:
        """Whether some lie in shards elsewhere, and their pictures with them."""
        return any(is_remote(part.held.lies) for part in self.chosen)

    @property
    def said(self) -> np.ndarray:
        """For each record a digest of what is read of it, uint64 [N]."""
        return np.concatenate([np.empty(0, np.uint64)] + [part.held.said[part.rows] for part in self.chosen])

    @property
    def nbytes(self) -> int:
        """Size of what they lie in."""
        return sum({id(part.held): part.held.nbytes for part in self.chosen}.values())

    def content(self, whole: bool = False) -> str:
        """A digest of all records as they are read, in their order, wherever their files lie.

        Args:
            whole: pictures of shards are read and stand in their records, as in indexes of earlier versions.
        """
        if self.nbytes < KEPT_FROM or (folder := cache_folder()) is None:
            return self._content(whole)
        said = hashlib.sha256(self.said.tobytes()).hexdigest()[:40]
        name = f"{DIGESTS}/{said}{'-with-pictures' * whole}"
        return remembered(folder, name, lambda: self._content(whole))

    def _content(self, whole: bool) -> str:
        if whole:  # the sizes come first, so that pictures are read twice: they need not fit into memory
            sizes = np.array([len(content) for content in self._contents(True)], np.int64)
        else:
            sizes = np.concatenate([np.empty(0, np.int64)] + [part.held.sizes[part.rows] for part in self.chosen])
        digest = hashlib.sha256(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64).tobytes())
        for content in self._contents(whole):
            digest.update(content)
        return f"sha256 {digest.hexdigest()[:32]}"

    def _contents(self, whole: bool) -> Iterator[bytes]:
        """The records, as JSON. `whole`: with their pictures."""
        if whole:
            records = (with_pictures(self[number]) for number in range(len(self)))
            return (json.dumps(record, ensure_ascii=False).encode() for record in records)
        return (part.held.content(row) for part in self.chosen for row in part.rows.tolist())


def load_records(
    paths: str | Path | Sequence[str | Path],
    skip_list: str | Path | SkipList | None = None,
    roles: tuple[str, str] = ROLES,
) -> Records:
    """All records of one or several files. What in them means nothing is logged.

    Args:
        paths: data files of any format (see `formats.py`), patterns, or mixtures of such.
        skip_list: a file that `moellava check-data --skip-list` wrote, or its content; the records it names are left
            out.
        roles: what the files call the human and the model, beside the usual names.

    Raises:
        DataError: with one line for every problem of every file.
        UserError: a package that a file's format needs is not installed.
    """
    skip = read_skip_list(skip_list) if isinstance(skip_list, str | Path) else skip_list
    records, problems = read_records(paths, skip, roles)
    if problems:
        raise DataError([problem.text for problem in problems])
    for notice in records.notices:
        get_logger().warning("%s", notice)
    return records


def read_records(
    paths: str | Path | Sequence[str | Path], skip: SkipList | None = None, roles: tuple[str, str] = ROLES
) -> tuple[Records, list[Problem]]:
    """The sound records of the files, and what is wrong with the others; those in `skip` are in neither."""
    records, problems, skip = Records(), [], SkipList() if skip is None else skip
    seen: set[str] = set()
    for path in [paths] if isinstance(paths, str | Path) else paths:
        try:
            listing = listing_of(path)
        except DataError as error:
            problems += [Problem(None, text) for text in error.problems]
            continue
        indexes = [[index_of(file, roles) for file in part.files] for part in listing.parts]
        try:
            rows = taken(listing, [sum(map(len, part)) for part in indexes])
        except DataError as error:
            problems += [Problem(None, text) for text in error.problems]
            continue
        for part, found, numbers in zip(listing.parts, indexes, rows, strict=True):
            for file, index, own in zip(part.files, found, _apart(numbers, found), strict=True):
                seen |= set(index.facts["seen"])
                problems += _take(records, file, index, own, skip)
    speakers = RecordReader(roles).speakers
    speakers.seen = seen
    for name in speakers.unmet if len(records) or problems else ():
        known = ", ".join(sorted(map(brief_text, seen))) or "nobody"
        text = f"no turn is from {name!r}, as --user_key or --assistant_key says; there are {known}"
        problems.append(Problem(None, text))
    return records, problems


def _apart(numbers: Sequence[int], indexes: Sequence[FileIndex]) -> list[np.ndarray]:
    """Numbers of rows of several indexes together, in order -> the rows of each."""
    borders = np.cumsum([0] + list(map(len, indexes)))
    rows = np.arange(numbers.start, numbers.stop) if isinstance(numbers, range) else np.asarray(numbers, np.int64)
    cuts = np.searchsorted(rows, borders)
    return [(rows[cuts[n] : cuts[n + 1]] - borders[n]).astype(np.int32) for n in range(len(indexes))]


def _take(records: Records, file: str, index: FileIndex, rows: np.ndarray, skip: SkipList) -> list[Problem]:
    """Adds records of a file, or leaves them out; what is wrong with the others, and with the file."""
    numbers = list(skip.numbers_in(file))
    named = np.unique(rows[np.isin(rows, numbers)]) if numbers else rows[:0]
    left_out = [row for row in named.tolist() if skip.holds(key_of(file, row, int(index.digests[row])))]
    kept = rows[~np.isin(rows, left_out)] if left_out else rows
    records.skipped += len(rows) - len(kept)
    states = index.states[kept]
    problems = []
    for row in dict.fromkeys(kept[states == WRONG].tolist()):
        name, problem = json.loads(index.content(row))
        problems.append(Problem(str(key_of(file, row, int(index.digests[row]))), f"{_name(name, file)} {problem}"))
    problems += [Problem(None, text) for text in index.facts["problems"]]
    if not len(index) and not problems:
        problems.append(Problem(None, f"{file} holds no records"))
    records.notices += _notices(file, index.facts["ignored"], int((states == TAGGED).sum()))
    records.add(Chosen(file, index, kept[states != WRONG]))
    return problems


def _notices(path: str, ignored: dict[str, int], without_media: int) -> list[str]:
    """What of a file means nothing."""
    listed = [f"{brief_text(key)!r} in {count}" for key, count in sorted(ignored.items())]
    found = [f"{path}: keys that mean nothing here are ignored: {', '.join(listed)} records"] if listed else []
    if without_media:
        found.append(f"{path}: tags of images or videos are text in {without_media} records, which have none")
    return found


def _name(name: str, file: str) -> str:
    return f"Record {name} of {brief_text(file)}"
