# SPDX-License-Identifier: Apache-2.0
"""Several processes: each question once, all end together, and a run that was killed goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moellava.eval.journal import Journal
from moellava.eval.launch import PARENT, run_processes
from tests.processes import ROOT, environment

SECONDS = 240


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_processes_are_told_apart(tmp_path):
    names = f"os.environ['WORLD_SIZE'] + os.environ[{PARENT!r}]"
    code = f"import os, pathlib; pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text({names})"
    assert run_processes(python(code), 3) == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys("012", f"3{os.getpid()}")


def test_when_one_fails_all_end():
    code = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit(3); time.sleep(900)"
    assert run_processes(python(code), 2) == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_was_killed_goes_on_and_asks_nothing_twice(eval_model, tmp_path):
    """SIGKILL of the command in the middle of two processes' work: the others end, and the next run asks the rest."""
    folder = tmp_path / "easy-vqa"
    words = ["--model-path", str(eval_model), "--limit", "240", "--batch-size", "2", "--output-dir", str(tmp_path)]
    command = [sys.executable, "-m", "moellava.cli", "eval", *words, "--processes", "2"]

    first = subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL)
    end = time.monotonic() + SECONDS
    while len(list(folder.glob("*.part-*"))) < 2 or Journal(folder).count() < 24:
        assert first.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    while alive(eval_model):
        assert time.monotonic() < end, "a process has outlived the one that started it"
        time.sleep(0.1)
    kept = {path: path.read_bytes() for path in folder.glob("*.part-*")}
    assert len(kept) == 2
    known = Journal(folder).known()
    assert 24 <= len(known) < 240
    part = min(kept)
    part.write_bytes(kept[part] + b'{"question_id": 7, "text": "half a l')

    again = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert again.returncode == 0, again.stderr
    assert int(re.search(r"easy-vqa: (\d+) of 240 were answered before", again.stderr)[1]) >= len(known)
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [row["metadata"]["index"] for row in rows] == list(range(240))
    assert all(rows[place] == row for place, row in known.items())
    assert not list(folder.glob("*.part-*"))
    assert "of 240 questions" in again.stdout


def alive(model: Path) -> list[str]:
    """The processes that evaluate a model."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended meanwhile
            continue
        if str(model) in words and "eval" in words:
            found.append(path.parent.name)
    return found
