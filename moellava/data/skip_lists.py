# SPDX-License-Identifier: Apache-2.0
"""Lists of records to leave out. `moellava check-data --skip-list` writes them, `--skip_list` in training reads them.

    a/train.json:1:5b1c98a0f3d2e417	Record 1 of a/train.json has …

A line begins with the record's key: its file as it was given, its number in it, and a digest of what it says. A record
is meant where the file's name, the number and the digest are those of the key; so a list serves from another folder,
and no file loses a record because of another one's name. Old lists have no digests; they are read where they are
unambiguous.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from moellava.data.record_keys import brief_text
from moellava.errors import DataError
from moellava.files import file_problem, require_output, written

_KEY = re.compile(r"(?P<file>.+):(?P<number>\d+):(?P<digest>[0-9a-f]{16})", re.DOTALL)
_OLD_KEY = re.compile(r"(?P<file>.+):(?P<number>\d+)", re.DOTALL)


class Key(NamedTuple):
    """What a skip list calls a record.

    Attributes:
        file: as it was given.
        number: of the record in it, from 0.
        digest: of what the record says, in hexadecimal; None in an old list.
    """

    file: str
    number: int
    digest: str | None

    def __str__(self) -> str:
        file = self.file if self.file.isprintable() and not self.file.startswith('"') else json.dumps(self.file)
        return f"{file}:{self.number}:{self.digest}"


def key_of(file: str | Path, number: int, digest: int) -> Key:
    """The key of a record; `digest` is of `digest_of`."""
    return Key(str(file), number, f"{digest:016x}")


class SkipList:
    """Records to leave out.

    Args:
        keys: of the records.
        name: of the list, for messages.
    """

    def __init__(self, keys: Iterable[Key] = (), name: str = "the skip list"):
        self.name = name
        self.keys = list(keys)
        self._unmet = set(self.keys)
        self._by_place: dict[tuple[str, int], list[Key]] = {}
        for key in self.keys:
            self._by_place.setdefault((Path(key.file).name, key.number), []).append(key)
        self._old_files: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def holds(self, found: Key) -> bool:
        """Whether a record is to be left out.

        Raises:
            DataError: the list is old and means a record of either of two files; or the record that it means in this
                very file says something else now.
        """
        keys = self._by_place.get((Path(found.file).name, found.number), ())
        for key in keys:
            if key.digest is None:
                self._one_file(found)
            elif key.digest != found.digest:
                continue
            self._unmet.discard(key)
            return True
        if any(key.file == found.file for key in keys):
            raise DataError(
                f"{self.name} was written for other contents of {found.file}: record {found.number} has changed since. "
                "Write it anew: moellava check-data … --skip-list"
            )
        return False

    def numbers_in(self, file: str) -> set[int]:
        """Numbers of records that it may mean in a file: those that `holds` is worth asking about."""
        name = Path(file).name
        return {number for place, number in self._by_place if place == name}

    def require_used(self) -> None:
        """Raises DataError where the list names records, and none of them is in the files that were read."""
        if self.keys and len(self._unmet) == len(set(self.keys)):
            raise DataError(f"{self.name} names {len(self._unmet)} records, none of which is in the data files")

    def _one_file(self, found: Key) -> None:
        name = Path(found.file).name
        other = self._old_files.setdefault(name, found.file)
        if other != found.file:
            raise DataError(
                f"{self.name} tells files by their names alone, and both {other} and {found.file} are called {name}. "
                "Write it anew: moellava check-data … --skip-list"
            )


def read_skip_list(path: str | Path) -> SkipList:
    """A skip list, one key a line, up to the first tab. Raises DataError if it cannot be read."""
    problem = file_problem(path)
    if problem:
        raise DataError(f"{path}: the skip list cannot be read: {problem}")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the skip list cannot be read: {error}") from error
    keys = [_parsed(line.split("\t")[0], path, number) for number, line in enumerate(lines, start=1) if line.strip()]
    return SkipList(keys, f"The skip list {path}")


def write_skip_list(path: str | Path, problems: Sequence[tuple[str | None, str]], flag: str = "--skip-list") -> int:
    """Writes one line `key TAB message` per record that has a problem.

    Args:
        path: of the list.
        problems: (key, message) of records; a file's has no key.
        flag: what the user gave the path by.

    Returns:
        How many records these are.

    Raises:
        UserError: it cannot be written.
    """
    first = {key: text for key, text in reversed(problems) if key is not None}
    lines = [f"{key}\t{' '.join(text.split())}\n" for key, text in reversed(first.items())]
    with written(require_output(path, flag)) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    return len(lines)


def _parsed(text: str, path: str | Path, line: int) -> Key:
    match = _KEY.fullmatch(text) or _OLD_KEY.fullmatch(text)
    if match is None:
        raise DataError(f"{path}, line {line}: {brief_text(text)!r} is no key of a record (file:number:digest)")
    file, digest = match["file"], match.groupdict().get("digest")
    try:
        return Key(json.loads(file) if file.startswith('"') else file, int(match["number"]), digest)
    except ValueError as error:
        raise DataError(f"{path}, line {line}: {brief_text(text)!r} is no key of a record: {error}") from error
