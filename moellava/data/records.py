# SPDX-License-Identifier: Apache-2.0
"""Records of data files, in a compact index. All that is wrong with the files is found in one pass.

A record is `{"id", "image": path | [path, …], "conversations": [{"from": "human" | "gpt", "value": text}, …]}`, where
"video" may stand beside "image" or in its place, "system_prompt" beside them, and `"train": false` in an answer that is
not trained on. Whatever files call it (`record_keys.py`), and whatever format they have (`formats.py`), here it is so.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moellava.constants import MODALITIES, ROLES
from moellava.data.formats import Broken
from moellava.data.mixtures import Entry, entries
from moellava.data.record_keys import asked_in, brief, brief_text
from moellava.data.record_reader import RecordReader
from moellava.data.skip_lists import SkipList, digest_of, key_of, read_skip_list
from moellava.errors import DataError
from moellava.log import get_logger

Source = Sequence[dict[str, Any]]
"""A conversation as LLaVA stores it: `[{"from": "human" | "gpt", "value": text}, …]`."""

MEDIA_TAG = re.compile(f"<({'|'.join(MODALITIES)})>")

MAX_DEPTH = 64
"""Lists and objects inside each other that a record may have. Python's own limit moves with whoever reads it."""


class Medium(NamedTuple):
    """An image or a video of a record.

    Attributes:
        modality: of `MODALITIES`.
        path: of its file, as the record writes it, or a data URI; in a chat also the image or the video itself.
    """

    modality: str
    path: Any


class Problem(NamedTuple):
    """Something wrong with a data file.

    Attributes:
        key: of the record, as a skip list has it; None where the whole file is meant.
        text: the message, which names file and record.
    """

    key: str | None
    text: str


class Records(Sequence[dict[str, Any]]):
    """Records in one buffer of bytes and an array of offsets, parsed when asked for.

    Worker processes share the buffer: no Python object is touched by reading, so no page of it is copied, as would
    happen to a list of dicts.

    Attributes:
        files: the data files.
        skipped: records left out because a skip list names them.
        notices: what was read and means nothing, a line each, for whoever reads the files to say.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._ends = array("q", [0])
        self._file_of = array("i")
        self._number = array("q")
        self._digest = array("Q")
        self.files: list[str] = []
        self.skipped = 0
        self.notices: list[str] = []

    def __len__(self) -> int:
        return len(self._file_of)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]  # slices are of no use here
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index %= len(self)
        return json.loads(bytes(self._buffer[self._ends[index] : self._ends[index + 1]]))

    def name(self, index: int) -> str:
        """How messages call a record: by its id, or else its number, and its file."""
        return _name(self[index], self._number[index], self.files[self._file_of[index]])

    def key(self, index: int) -> str:
        """How a skip list calls a record."""
        return str(key_of(self.files[self._file_of[index]], self._number[index], self._digest[index]))

    def content(self) -> str:
        """A digest of all records as they are read, in their order, wherever their files lie."""
        digest = hashlib.sha256(self._ends.tobytes())
        digest.update(self._buffer)
        return f"sha256 {digest.hexdigest()[:32]}"

    def append(self, record: dict[str, Any], file: str, number: int, digest: int) -> None:
        """Adds a record. Raises UnicodeEncodeError on text that holds half of a surrogate pair."""
        encoded = json.dumps(record, ensure_ascii=False).encode("utf-8")
        if not self.files or self.files[-1] != file:
            self.files.append(file)
        self._buffer += encoded
        self._ends.append(len(self._buffer))
        self._file_of.append(len(self.files) - 1)
        self._number.append(number)
        self._digest.append(digest)


def load_records(
    paths: str | Path | Sequence[str | Path],
    skip_list: str | Path | SkipList | None = None,
    roles: tuple[str, str] = ROLES,
) -> Records:
    """All records of one or several files. What in them means nothing is logged.

    Args:
        paths: data files of any format (see `formats.py`), or mixtures of such.
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
    records, problems, reader = Records(), [], RecordReader(roles)
    skip = SkipList() if skip is None else skip
    for path in [paths] if isinstance(paths, str | Path) else paths:
        filled, without_media = False, 0
        try:
            for entry in entries(path):
                filled = True
                problem, is_typed = _take(records, entry, reader, skip)
                problems += [problem] if problem else []
                without_media += is_typed
        except DataError as error:
            problems += [Problem(None, text) for text in error.problems]
        else:
            if not filled:
                problems.append(Problem(None, f"{path} holds no records"))
        records.notices += _notices(path, reader, without_media)
    for name in reader.speakers.unmet if len(records) or problems else ():
        seen = ", ".join(sorted(map(brief_text, reader.speakers.seen))) or "nobody"
        text = f"no turn is from {name!r}, as --user_key or --assistant_key says; there are {seen}"
        problems.append(Problem(None, text))
    return records, problems


def _take(records: Records, entry: Entry, reader: RecordReader, skip: SkipList) -> tuple[Problem | None, bool]:
    """Adds a record of a file, or leaves it out; what is wrong with it, and whether tags in it are text."""
    file, number, value = entry
    is_broken = isinstance(value, Broken)
    encoded, is_deep = _encoded(value.text if is_broken else value)
    digest = digest_of(encoded)
    key = key_of(file, number, digest)
    if skip.holds(key):
        records.skipped += 1
        return None, False
    problem = value.problem if is_broken else "is nested too deeply" if is_deep else None
    record: dict[str, Any] = {}
    if problem is None:
        try:
            record = reader.read(value)
            problem = problem_of(record)
            if problem is None:
                records.append(record, file, number, digest)
        except UnicodeEncodeError as error:
            problem = f"has text with half of a surrogate pair, {error.object[error.start : error.end]!r}"
        except DataError as error:
            problem = str(error)
    if problem:
        return Problem(str(key), f"{_name(value, number, file)} {problem}"), False
    return None, not shows_media(record) and bool(tags_of(record["conversations"]))


def _encoded(value: Any) -> tuple[bytes, bool]:
    """A value as JSON, and whether it is nested too deeply."""
    try:
        encoded = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
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


def _notices(path: str | Path, reader: RecordReader, without_media: int) -> list[str]:
    """What of a file means nothing; the reader forgets it."""
    ignored = [f"{brief_text(key)!r} in {count}" for key, count in sorted(reader.ignored.items())]
    reader.ignored.clear()
    found = [f"{path}: keys that mean nothing here are ignored: {', '.join(ignored)} records"] if ignored else []
    if without_media:
        found.append(f"{path}: tags of images or videos are text in {without_media} records, which have none")
    return found


def paths_of(record: dict[str, Any], modality: str) -> list[Any]:
    """The image or video paths of a record, as it writes them."""
    paths = record.get(modality)
    if not paths:
        return []
    return list(paths) if isinstance(paths, list | tuple) else [paths]


def shows_media(record: dict[str, Any]) -> bool:
    """Whether a record has images or videos."""
    return any(record.get(modality) for modality in MODALITIES)


def media_of(record: dict[str, Any]) -> list[Medium]:
    """The images and videos of a sound record, in the order of their tags. Without any, tags are text."""
    if not shows_media(record):
        return []
    left = {modality: iter(paths_of(record, modality)) for modality in MODALITIES}
    return [Medium(modality, next(left[modality])) for modality in tags_of(record["conversations"])]


def tags_of(source: Source) -> list[str]:
    """What the media tags stand for in the questions of a conversation, in their order."""
    return [modality for turn in source if turn["from"] == ROLES[0] for modality in MEDIA_TAG.findall(turn["value"])]


def trained_answers(source: Source) -> list[bool]:
    """For each answer of a conversation, whether it is trained on; one that leads it is left out, as everywhere."""
    turns = source[1:] if source[0]["from"] == ROLES[1] else source
    return [turn.get("train") is not False for turn in turns if turn["from"] == ROLES[1]]


def problem_of(record: dict[str, Any]) -> str | None:
    """What is wrong with a record whatever the template, as the end of a sentence; None if nothing is."""
    if "conversations" not in record:
        keys = brief_text(", ".join(map(str, record)) or "none")
        return f'has no "conversations" (its keys: {keys}){asked_in(record)}'
    return problem_of_turns(record["conversations"]) or _problem_of_counts(record)


def problem_of_turns(source: Any) -> str | None:
    """What is wrong with the turns of a conversation, as the end of a sentence; None if nothing is."""
    if not isinstance(source, Sequence) or isinstance(source, str):
        return f"has no list of turns: {brief(source)}"
    for number, turn in enumerate(source):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
            return f'has a turn {number} that is not {{"from": …, "value": text}}: {brief(turn)}'
        if turn["from"] not in ROLES:
            return f"has a turn {number} from {brief(turn['from'])}; known are {' and '.join(map(repr, ROLES))}"
    if not source:
        return "has no turns"
    skipped = 1 if source[0]["from"] == ROLES[1] else 0
    if len(source) == skipped:
        return "has no question"
    for number, turn in enumerate(source[skipped:], start=skipped):
        if turn["from"] != ROLES[(number - skipped) % 2]:
            return f"has roles that do not alternate: turns {number - 1} and {number} are both from {turn['from']!r}"
    return None


def _problem_of_counts(record: dict[str, Any]) -> str | None:
    turns = record["conversations"]
    if not shows_media(record):
        return None
    tags = tags_of(turns)
    for modality in MODALITIES:
        given = len(paths_of(record, modality))
        if tags.count(modality) != given:
            shown = brief(turns[0]["value"])
            return f"has {given} {modality}s but {tags.count(modality)} <{modality}> tags in its questions: {shown}"
    return None


def _name(record: Any, number: int, file: str) -> str:
    identity = record.get("id") if isinstance(record, dict) else None
    return f"Record {number if identity is None else brief_text(identity)} of {brief_text(file)}"
