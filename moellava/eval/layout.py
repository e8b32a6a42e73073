# SPDX-License-Identifier: Apache-2.0
"""How benchmarks lie on the disk: a folder each in one root, as LLaVA's `eval.zip` unpacks (docs/EVAL.md lists them).

What a question file and what annotations say is read here, with an error that names file and line.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moellava.errors import UserError
from moellava.eval.benchmarks import Question
from moellava.files import NO_FILE, file_problem, read_json, refuse_pointer

Row = dict[str, Any]

DATA_FOLDER = "playground/data/eval"
"""Where LLaVA's `eval.zip` is unpacked by its own guide."""


@dataclass(frozen=True)
class Layout:
    """The folder of one benchmark.

    Args:
        task: its name, for messages.
        folder: where it lies.
    """

    task: str
    folder: Path

    def split(self, given: str | None, known: Sequence[str]) -> str:
        """The split that was asked for, or the first of those that there are. Raises UserError for another."""
        if given is not None and given not in known:
            raise UserError(f"--split {given}: {self.task} has {', '.join(known)}.")
        return given or known[0]

    def file(self, *names: str) -> Path:
        """The first of some files that is there. Raises UserError if none is."""
        for name in names:
            if file_problem(self.folder / name) is None:
                return self.folder / name
        problem = file_problem(self.folder / names[0])
        also = f" (nor {', '.join(names[1:])})" if len(names) > 1 and problem == NO_FILE else ""
        raise UserError(
            f"--task {self.task}: {self.folder / names[0]}{also}: {problem}. --data-folder names the folder that "
            "LLaVA's eval.zip was unpacked into; docs/EVAL.md says what belongs beside it."
        )

    def optional(self, *names: str) -> Path | None:
        """The first of some files that is there, or None."""
        return next((self.folder / name for name in names if file_problem(self.folder / name) is None), None)

    def questions(self, name: str, image_folder: str) -> list[Question]:
        """The questions of one of LLaVA's files: JSON Lines of question_id, image, text, category. Their right answers
        are not in it."""
        path = self.file(name)
        return [
            Question(
                text=text_of(row, "text", where),
                answer=None,
                image=self.folder / image_folder / text_of(row, "image", where),
                category=str(row.get("category", "default")),
                id=value_of(row, "question_id", where),
            )
            for row, where in lines_of(path)
        ]


def lines_of(path: Path) -> Iterator[tuple[Row, str]]:
    """(object, 'file, line n') of each line of a JSON Lines file. Raises UserError for what is no object."""
    refuse_pointer(path)
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where} is not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{where} holds no JSON object: {line.strip()[:80]!r}")
            yield row, where


def rows_of(content: Any, path: Path) -> Iterator[tuple[Row, str]]:
    """(object, 'file, entry n') of a list in a JSON file. Raises UserError for what is no list of objects."""
    if not isinstance(content, list):
        raise UserError(f"{path}: a list is expected, and this is {type(content).__name__}.")
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, entry {number} is no JSON object: {row!r:.80}")
        yield row, f"{path}, entry {number}"


def json_of(path: Path, expected: type) -> Any:
    """What a JSON file holds. Raises UserError if that is of another type."""
    content = read_json(path)
    if not isinstance(content, expected):
        raise UserError(f"{path}: a {expected.__name__} is expected, and this is a {type(content).__name__}.")
    return content


def table_of(path: Path) -> Iterator[tuple[dict[str, str], str]]:
    """(column -> text, 'file, row n') of a table with tabs. Fields may hold whole images."""
    refuse_pointer(path)
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file, delimiter="\t"), start=1):
            yield row, f"{path}, row {number}"


def value_of(row: Row, key: str, where: str) -> Any:
    """A field of a row. Raises UserError where it is missing."""
    if key not in row:
        raise UserError(f"{where} has no {key!r}; it has {', '.join(row) or 'nothing'}.")
    return row[key]


def text_of(row: Row, key: str, where: str) -> str:
    """A field that has to be a text. Raises UserError where it is not."""
    value = value_of(row, key, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} has to be a text, and is {value!r:.80}")
    return value
