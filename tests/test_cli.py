# SPDX-License-Identifier: Apache-2.0
"""What may go wrong with the output of any command: one place sees to it, for all of them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moellava.cli import CLOSED_PIPE, COMMANDS, INTERRUPTED, main
from moellava.errors import UserError
from tests import processes
from tests.processes import Finished


@pytest.fixture
def acting(monkeypatch) -> Callable[[str, Callable[[list[str]], int]], None]:
    """(command, main) -> that command does what `main` does."""
    return lambda command, act: monkeypatch.setattr(importlib.import_module(COMMANDS[command][0]), "main", act)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("--flag is wrong"), 2, "--flag is wrong"),
        (PermissionError(13, "Permission denied", "out.txt"), 2, "Permission denied: 'out.txt'"),
        (IsADirectoryError(21, "Is a directory", "out"), 2, "Is a directory: 'out'"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (BrokenPipeError(32, "Broken pipe"), CLOSED_PIPE, ""),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted"),
    ],
)
def test_no_command_ends_in_a_traceback_when_files_and_pipes_fail(command, error, status, said, acting, capsys):
    def fail(argv: list[str]) -> int:
        raise error

    acting(command, fail)
    assert main([command]) == status
    printed = capsys.readouterr()
    assert (f"moellava {command}: " in printed.err and said in printed.err) if said else printed.err == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bug_keeps_its_traceback(command, acting):
    def fail(argv: list[str]) -> int:
        raise ZeroDivisionError

    acting(command, fail)
    with pytest.raises(ZeroDivisionError):
        main([command])


def run(*words: str, **options: Any) -> Finished:
    """The command in a process of its own."""
    return processes.run([sys.executable, "-m", "moellava.cli", *words], timeout=120, **options)


@pytest.fixture
def odd_data(data_file, make_record) -> Path:
    """A record whose problem cannot be printed in ASCII, and many more of them than a pipe holds."""
    return data_file([{"id": f"é\ud83d🐱{n}", "conversations": []} for n in range(5000)])


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--help"], ["check-data", "--help"], ["check-data", "DATA"]])
def test_a_pipe_that_closes_ends_a_command_quietly(words, odd_data):
    read, write = os.pipe()
    os.close(read)
    done = run(*[str(odd_data) if word == "DATA" else word for word in words], stdout=write)
    os.close(write)
    assert done.returncode == CLOSED_PIPE and done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--help"], ["check-data", "--help"], ["check-data", "DATA"]])
def test_a_full_disk_is_told(words, odd_data):
    with Path("/dev/full").open("w") as full:
        done = run(*[str(odd_data) if word == "DATA" else word for word in words], stdout=full.fileno())
    assert done.returncode == 2 and "No space left on device" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_cannot_show_a_character_gets_its_escape(encoding, data_file):
    path = data_file([{"id": "é\ud83d🐱", "conversations": []}])
    done = run("check-data", str(path), env={"PYTHONIOENCODING": encoding})
    assert done.returncode == 1 and done.stderr == "" and "has no turns" in done.stdout
    assert run("--help", env={"PYTHONIOENCODING": encoding}).returncode == 0
