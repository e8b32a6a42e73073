# SPDX-License-Identifier: Apache-2.0
"""Answers on the disk as they come: a run that is killed goes on, and asks nothing twice.

In the folder of a task, `answers.jsonl` holds a line a question once all are answered. Until then each process appends
to a file of its own, `answers.part-{rank}.jsonl`, a batch at a time, on the disk before the next one begins; lines are
in LLaVA's layout, with the question's place in `metadata`. A later run of any number of processes reads all parts.
What a kill has cut off of the last line is dropped by the process that goes on writing there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moellava.errors import UserError
from moellava.eval.layout import Row
from moellava.files import read_object, write_json, written

IDENTITY = "run.json"


class Journal:
    """The lines of one task.

    Args:
        folder: of the task; it is made.
        name: of the files: answers, or reviews of them.
        rank: of this process.
    """

    def __init__(self, folder: Path, name: str = "answers", rank: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name = folder, name
        self.whole = folder / f"{name}.jsonl"
        self.part = folder / f"{name}.part-{rank}.jsonl"
        self.repaired = False

    def known(self) -> dict[int, Row]:
        """The question's place -> its line, for all that is answered. Raises UserError for a damaged file."""
        rows: dict[int, Row] = {}
        for path in [*self._parts(), self.whole]:  # the whole is there before the parts go
            rows |= {row["metadata"]["index"]: row for row in complete_lines(path)}
        return rows

    def count(self) -> int:
        """How many lines there are, those that are cut off left out; cheaper than to read them."""
        return sum(content.count(b"\n") for content in map(_content, [*self._parts(), self.whole]))

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends lines, and returns when they are on the disk."""
        if not self.repaired:
            self._repair()
        with open(self.part, "ab") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes the whole file, and then removes the parts."""
        with written(self.whole) as temporary, open(temporary, "w", encoding="utf-8", errors="replace") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for path in self._parts():
            path.unlink(missing_ok=True)

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.name}.part-*.jsonl"))

    def _repair(self) -> None:
        """Drops the half of a line that a kill has left at the end of this process's part."""
        content = _content(self.part)
        if content and not content.endswith(b"\n"):
            os.truncate(self.part, content.rfind(b"\n") + 1)
        self.repaired = True


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:  # not begun, or joined into the whole meanwhile
        return b""


def complete_lines(path: Path) -> list[Row]:
    """The lines of a file that end. Raises UserError for one that is none of ours."""
    rows = []
    for number, line in enumerate(_content(path).split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            _ = row["metadata"]["index"] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}, line {number} is damaged: {line[:80]!r}. Remove the line; its question is asked again."
            ) from error
        rows.append(row)
    return rows


def claim(folder: Path, identity: Mapping[str, Any], first: bool) -> None:
    """Makes sure that the answers in a folder are those of this model to these questions.

    Args:
        folder: of the task.
        identity: what decides an answer.
        first: whether this process notes it where nothing is noted yet.

    Raises:
        UserError: the folder belongs to another run.
    """
    noted = read_object(folder / IDENTITY)
    differing = [name for name in identity if noted and noted.get(name) != identity[name]]
    if differing:
        told = "; ".join(f"{name} is {noted.get(name)!r} there and {identity[name]!r} here" for name in differing)
        raise UserError(f"--output-dir: {folder} holds answers of another run: {told}. Choose another, or remove it.")
    if first and not noted:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / IDENTITY, dict(identity))
