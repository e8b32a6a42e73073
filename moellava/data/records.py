"""Data files -> records, in a compact index. All that is wrong with the files is found in one pass.

A record is `{"id", "image": path | [path, …], "conversations": [{"from": "human" | "gpt", "value": text}, …]}`, where
"video" may stand beside "image" or in its place; files are JSON lists of records, or JSON Lines.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moellava.errors import DataError

Source = Sequence[dict[str, str]]
"""A conversation as LLaVA stores it: `[{"from": "human" | "gpt", "value": text}, …]`."""

ROLES = ("human", "gpt")

MODALITIES = ("image", "video")
"""What a record may show: a key of the record, and the name of the tag that stands for one in its questions."""

MEDIA_TAG = re.compile(f"<({'|'.join(MODALITIES)})>")


class Medium(NamedTuple):
    """An image or a video of a record.

    Attributes:
        modality: of `MODALITIES`.
        path: of its file, as the record writes it; in a chat also the image or the video itself.
    """

    modality: str
    path: Any


class Problem(NamedTuple):
    """Something wrong with a data file.

    Attributes:
        key: of the record (see `key_of`); None where the whole file is meant.
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
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._ends = array("q", [0])
        self._file_of = array("i")
        self._number = array("q")
        self.files: list[str] = []
        self.skipped = 0

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
        return key_of(self.files[self._file_of[index]], self._number[index])

    def append(self, record: dict[str, Any], file: str, number: int) -> None:
        """Adds a record. Raises UnicodeEncodeError on text that holds half of a surrogate pair."""
        encoded = json.dumps(record, ensure_ascii=False).encode("utf-8")
        if not self.files or self.files[-1] != file:
            self.files.append(file)
        self._buffer += encoded
        self._ends.append(len(self._buffer))
        self._file_of.append(len(self.files) - 1)
        self._number.append(number)


def key_of(file: str | Path, number: int) -> str:
    """How a skip list calls a record: the file's name without its folder, and the record's number in it from 0."""
    return f"{Path(file).name}:{number}"


def load_records(
    paths: str | Path | Sequence[str | Path],
    skip_list: str | Path | None = None,
    roles: tuple[str, str] = ROLES,
) -> Records:
    """All records of one or several files.

    Args:
        paths: JSON or JSON Lines files.
        skip_list: a file that `moellava check-data --skip-list` wrote; the records it names are left out.
        roles: what the files call the human and the model.

    Raises:
        DataError: with one line for every problem of every file.
    """
    records, problems = read_records(paths, frozenset() if skip_list is None else read_skip_list(skip_list), roles)
    if problems:
        raise DataError([problem.text for problem in problems])
    return records


def read_records(
    paths: str | Path | Sequence[str | Path], skip: Collection[str] = (), roles: tuple[str, str] = ROLES
) -> tuple[Records, list[Problem]]:
    """The sound records of the files, and what is wrong with the others; keys in `skip` are left out of both."""
    records, problems = Records(), []
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        try:
            entries = list(_entries(Path(path)))
        except DataError as error:
            problems.append(Problem(None, str(error)))
            continue
        if not entries:
            problems.append(Problem(None, f"{path} holds no records"))
        for number, entry in enumerate(entries):
            key = key_of(path, number)
            if key in skip:
                records.skipped += 1
                continue
            if roles != ROLES:
                entry = with_our_roles(entry, roles)
            problem = entry.problems[0] if isinstance(entry, DataError) else problem_of(entry)
            problem = problem or _append(records, entry, str(path), number)
            if problem:
                problems.append(Problem(key, f"{_name(entry, number, str(path))} {problem}"))
    return records, problems


def with_our_roles(entry: Any, roles: tuple[str, str]) -> Any:
    """A record whose turns are from `roles`, with `ROLES` in their place; anything else as it is."""
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list):
        return entry
    ours = dict(zip(roles, ROLES, strict=True))
    renamed = [
        turn | {"from": ours.get(str(turn.get("from")), turn.get("from"))} if isinstance(turn, dict) else turn
        for turn in turns
    ]
    return entry | {"conversations": renamed}


def read_skip_list(path: str | Path) -> frozenset[str]:
    """The record keys of a skip list, one a line, up to the first tab. Raises DataError if it cannot be read."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the skip list cannot be read: {error}") from error
    return frozenset(line.split("\t")[0] for line in lines if line.strip())


def paths_of(record: dict[str, Any], modality: str) -> list[Any]:
    """The image or video paths of a record, as it writes them."""
    paths = record.get(modality)
    if not paths:
        return []
    return list(paths) if isinstance(paths, list | tuple) else [paths]


def media_of(record: dict[str, Any]) -> list[Medium]:
    """The images and videos of a sound record, in the order of their tags."""
    left = {modality: iter(paths_of(record, modality)) for modality in MODALITIES}
    return [Medium(modality, next(left[modality])) for modality in tags_of(record["conversations"])]


def tags_of(source: Source) -> list[str]:
    """What the media tags stand for in the questions of a conversation, in their order."""
    return [modality for turn in source if turn["from"] == ROLES[0] for modality in MEDIA_TAG.findall(turn["value"])]


def problem_of(record: Any) -> str | None:
    """What is wrong with a record whatever the template, as the end of a sentence; None if nothing is."""
    if not isinstance(record, dict):
        return f"is no JSON object: {str(record)[:80]}"
    if "conversations" not in record:
        return f'has no "conversations" (its keys: {", ".join(map(str, record)) or "none"})'
    for modality in MODALITIES:
        paths = record.get(modality)
        if paths is not None and not isinstance(paths, (str, list)):
            return f'has "{modality}", which is neither a path nor a list of paths: {str(paths)[:80]}'
        if not all(isinstance(path, str) and path for path in paths_of(record, modality)):
            return f'has an entry of "{modality}" that is no path: {str(paths)[:80]}'
    return problem_of_turns(record["conversations"]) or _problem_of_counts(record)


def problem_of_turns(source: Any) -> str | None:
    """What is wrong with the turns of a conversation, as the end of a sentence; None if nothing is."""
    if not isinstance(source, Sequence) or isinstance(source, str):
        return f"has no list of turns: {str(source)[:80]}"
    for number, turn in enumerate(source):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
            return f'has a turn {number} that is not {{"from": …, "value": text}}: {str(turn)[:80]}'
        if turn["from"] not in ROLES:
            return f"has a turn {number} from {turn['from']!r}; known are {' and '.join(map(repr, ROLES))}"
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
    tags = tags_of(turns)
    for modality in MODALITIES:
        given = len(paths_of(record, modality))
        if tags.count(modality) != given:
            shown = turns[0]["value"][:80]
            return f'has {given} {modality}s but {tags.count(modality)} <{modality}> tags in its questions: "{shown}"'
    return None


def _append(records: Records, record: dict[str, Any], file: str, number: int) -> str | None:
    try:
        records.append(record, file, number)
    except UnicodeEncodeError as error:
        return f"has text with half of a surrogate pair, {error.object[error.start : error.end]!r}"
    return None


def _name(record: Any, number: int, file: str) -> str:
    identity = record.get("id") if isinstance(record, dict) else None
    return f"Record {number if identity is None else identity} of {file}"


def _entries(path: Path) -> Iterable[Any]:
    """What a file lists, parsed. A line of a JSON Lines file that cannot be parsed is a DataError in its place.

    Raises:
        DataError: the file is missing, empty, not UTF-8, or neither a JSON list nor JSON Lines.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such data file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not text.strip():
        raise DataError(f"{path} is empty")
    if path.suffix == ".jsonl":
        return _lines(text)
    try:
        entries = json.loads(text)
    except ValueError as error:
        if text.lstrip().startswith("{") and "\n" in text.strip():
            return _lines(text)
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(entries, list):
        raise DataError(f"{path} holds a JSON {type(entries).__name__}, not a list of records")
    return entries


def _lines(text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            yield DataError(f"is not valid JSON (line {number}): {error}")
