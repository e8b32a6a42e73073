# SPDX-License-Identifier: Apache-2.0
"""Mutations still apply, and the command that tries them tells those that are killed from one that survives."""

from __future__ import annotations

import ast
import json
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import mutants
from tests.mutants import ROOT, Copy, NotGreenError, Result, Trial, applied, chosen, tried
from tests.mutations import MUTATIONS, Mutation

NAMES = [mutation.name for mutation in MUTATIONS]

SAMPLE = {"sample": 2, "seed": 8}
"""What is tried here; all of them take some ten minutes."""


@pytest.mark.parametrize("mutation", MUTATIONS, ids=NAMES)
def test_every_mutation_applies(mutation):
    text = (ROOT / "moellava" / mutation.file).read_text(encoding="utf-8")
    before, after = (ast.dump(ast.parse(code)) for code in (text, applied(mutation, text)))
    assert before != after, "it changes nothing"
    assert mutation.killers and not [file for file in mutation.killers if not (ROOT / "tests" / file).is_file()]


def test_names_are_unique():
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("text", ["other = 1\n", "line = 1\nline = 1\n"])
def test_a_line_that_is_gone_or_there_twice_is_an_error(text):
    with pytest.raises(ValueError, match="gone: moellava/file.py holds its line [02] times: line = 1"):
        applied(Mutation("gone", "file.py", "line = 1", "line = 2", "nothing", ("test_files.py",)), text)


def test_mutations_are_chosen_by_name_or_by_lot():
    assert chosen([], None, 0) == list(MUTATIONS)
    assert [mutation.name for mutation in chosen(NAMES[3:1:-1], None, 0)] == NAMES[3:1:-1]
    drawn = chosen([], 3, 1)
    assert drawn == chosen([], 3, 1) and drawn != chosen([], 3, 2) and len({*drawn}) == 3
    with pytest.raises(ValueError, match="--only no-such: known are"):
        chosen(["no-such"], None, 0)


class Rehearsal(Copy):
    """A copy without files, in which the first failure is known: of the named files, of all, and of all as they are."""

    def __init__(self, named: str | None, mutated: str | None, sound: str | None = None):
        self.root, self.is_mutated = Path("copy"), False
        self.named, self.of_all = named, {True: mutated, False: sound}

    def imported_from(self) -> Path:
        return self.root / "moellava" / "__init__.py"

    @contextmanager
    def mutated(self, mutation):
        self.is_mutated = True
        yield
        self.is_mutated = False

    def first_failure(self, files=()):
        return self.named if files else self.of_all[self.is_mutated]


@pytest.mark.parametrize(
    ("copy", "only_named", "killer", "named"),
    [
        (Rehearsal("a test", "another"), False, "a test", True),
        (Rehearsal(None, "another"), False, "another", False),
        (Rehearsal(None, None), False, None, True),
        (Rehearsal(None, "another"), True, None, True),
    ],
)
def test_all_tests_are_asked_where_the_named_ones_pass(copy, only_named, killer, named):
    result = Trial(copy, only_named).result(MUTATIONS[0])
    assert (result.killer, result.named, result.is_killed) == (killer, named, killer is not None)


def test_failures_that_are_there_without_a_mutation_kill_nothing(monkeypatch):
    with pytest.raises(NotGreenError, match="another fails without any mutation"):
        Trial(Rehearsal(None, "another", sound="another"), only_named=False).result(MUTATIONS[0])
    elsewhere = Rehearsal(None, None)
    monkeypatch.setattr(elsewhere, "imported_from", lambda: Path("elsewhere/moellava/__init__.py"))
    with pytest.raises(NotGreenError, match="Python imports elsewhere"):
        Trial(elsewhere, only_named=False).require_green()


KILLED = Result("killed", "tests/test_files.py::test", 1.0)
SURVIVED = Result("survived", None, 1.0)
LOST = Result("lost", None, 0.0, problem="its line is gone")


@pytest.mark.parametrize(("result", "status"), [(KILLED, 0), (SURVIVED, 1), (LOST, 1)])
def test_the_exit_status_and_the_table_say_what_became_of_them(result, status, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(mutants, "tried", lambda mutations, only_named: iter([KILLED, result]))
    assert mutants.main(["--json", str(tmp_path / "results.json")]) == status
    said = {"killed": "tests/test_files.py::test", "survived": "SURVIVED", "lost": "its line is gone"}[result.name]
    rows = capsys.readouterr().out.splitlines()
    assert rows[1].split(maxsplit=2) == [result.name, str(result.seconds), said]
    assert rows[2] == f"{2 - status} of 2 are killed."
    assert [row["name"] for row in json.loads((tmp_path / "results.json").read_text())] == ["killed", result.name]


def test_tests_that_fail_without_a_mutation_say_nothing(monkeypatch, capsys):
    def failing(mutations, only_named):
        raise NotGreenError("tests/test_files.py::test fails without any mutation.")

    monkeypatch.setattr(mutants, "tried", failing)
    assert mutants.main([]) == 2 and "without any mutation" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sample_is_killed_and_what_no_test_looks_at_survives():
    unseen = Mutation("unseen", "files.py", "LEVELS_ABOVE = 3", "LEVELS_ABOVE = 4", "nothing", ("test_registry.py",))
    results = list(tried([*chosen([], **SAMPLE), unseen], only_named=True))
    assert [result.is_killed for result in results] == [True, True, False], results
