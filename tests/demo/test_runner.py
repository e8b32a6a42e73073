# SPDX-License-Identifier: Apache-2.0
"""Steps are not repeated, and failures are loud."""

from __future__ import annotations

import json
import os
import sys
import time

import pytest

from moellava.demo.runner import WORTH_SHOWING, Journal, StepFailed, run, run_side_by_side, start, stop
from moellava.moe.certificate import Certificate

NUMBERS = ("tokens", "max_abs_delta", "largest_logit", "kl")


@pytest.fixture
def steps(tmp_path):
    """run(settings by step name) -> the names of the steps that ran or were cleared, as one list."""

    def walk(settings: dict) -> list[str]:
        journal, happened = Journal(tmp_path / "journal.json"), []
        for name, value in settings.items():
            journal.step(name, value, lambda n=name: happened.append(n), lambda n=name: happened.append(f"clear {n}"))
        return happened

    return walk


def test_finished_steps_are_not_repeated(steps):
    assert steps({"a": 1, "b": 2}) == ["clear a", "a", "clear b", "b"]
    assert steps({"a": 1, "b": 2}) == []


def test_a_changed_step_and_all_after_it_run_anew(steps):
    steps({"a": 1, "b": 2, "c": 3})
    assert steps({"a": 1, "b": 9, "c": 3}) == ["clear b", "b", "clear c", "c"]


def test_a_stopped_step_goes_on_with_what_is_there(tmp_path):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Journal(tmp_path / "journal.json").step("a", 1, stop, lambda: None)
    cleared, ran = [], []
    Journal(tmp_path / "journal.json").step("a", 1, lambda: ran.append(1), lambda: cleared.append(1))
    assert (ran, cleared) == ([1], [])


def test_a_failure_shows_the_end_of_its_log(tmp_path):
    with pytest.raises(StepFailed, match=r"out of cheese[\s\S]*status 3[\s\S]*a\.log"):
        run([sys.executable, "-c", "print('out of cheese'); raise SystemExit(3)"], tmp_path / "logs" / "a.log", 1)
    assert "out of cheese" in (tmp_path / "logs" / "a.log").read_text()


def test_progress_is_shown_and_noise_is_not(tmp_path, capsys):
    said = run([sys.executable, "-c", "print('step 1/2  loss 1'); print('[2026-01-01] noise')"], tmp_path / "a.log", 1)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("   $ ")
    assert shown[1:] == ["     step 1/2  loss 1"]
    assert "noise" in said


def test_what_a_run_says_of_itself_is_shown():
    certificate = Certificate(True, {"init": "copy"}, "float32", 1e-4, {"text": dict.fromkeys(NUMBERS, 0.5)})
    said = [
        *("INFO " + "\n".join(certificate.lines())).splitlines(),
        *["INFO The first sample; «…» is what is trained on:", "  | <image>«a red circle»"],
        *["part                    trainable           frozen", "routers                     1,024                0"],
        *["  prompt    '<image>'", "  answer    'a'", "  reference 'b'"],
    ]
    assert [line for line in said if not WORTH_SHOWING.match(line)] == []
    noise = ["  return func(*args, **kwargs)", "[2026-11-27 18:10:55,838] [INFO] [launch.py:285:main] …", "No existing"]
    assert [line for line in noise if WORTH_SHOWING.match(line)] == []


def test_side_by_side_commands_get_their_threads(tmp_path):
    show = [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]
    said = run_side_by_side({tmp_path / "a.log": show, tmp_path / "b.log": show}, threads=3)
    assert sorted(text.strip() for text in said.values()) == ["3", "3"]


def test_one_failure_ends_the_others(tmp_path):
    commands = {
        tmp_path / "a.log": [sys.executable, "-c", "raise SystemExit('broken')"],
        tmp_path / "b.log": [sys.executable, "-c", "import time; time.sleep(600)"],
    }
    with pytest.raises(StepFailed, match="broken"):
        run_side_by_side(commands, threads=1)


def test_stopping_reaches_what_a_launcher_has_started(tmp_path):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    process = start([sys.executable, "-c", child], tmp_path / "a.log", threads=1)
    stop(process)
    assert process.returncode != 0
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # the group is gone once its last member has been reaped
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_the_journal_is_readable(tmp_path):
    Journal(tmp_path / "journal.json").step("a", {"rate": 1}, lambda: None, lambda: None)
    entry = json.loads((tmp_path / "journal.json").read_text())["a"]
    assert entry["finished"]
    assert entry["seconds"] == 0
