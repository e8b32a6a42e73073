# SPDX-License-Identifier: Apache-2.0
"""The demo itself, with a few steps and a few questions, through the real launcher."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, Finished, run


def run_demo(folder: Path) -> Finished:
    """`moellava demo --smoke` in a process and a folder of its own."""
    words = [sys.executable, "-m", "moellava.cli", "demo", "--smoke", "--output-dir", str(folder)]
    return run(words, timeout=850, cwd=folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_runs_once_and_is_not_repeated(tmp_path):
    first = run_demo(tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["recipe"] == "smoke"
    assert scores["seconds"] > 0
    for stage in ("stage2", "stage3"):
        assert set(scores[stage]) == {"accuracy", "accuracy_shuffled_images"}
        report = json.loads((tmp_path / "smoke" / "scores" / f"{stage}-accuracy.json").read_text())
        assert report["questions"] == 64
        assert report["accuracy"] == scores[stage]["accuracy"]
        assert report["prompt"]["example"].endswith("ASSISTANT:")
        assert report["versions"]["data"] == "PyPI easy-vqa 1.0"
    for name in (
        "routing/routing.html",
        "routing/load.png",
        "report/report.html",
        "report/experts.png",
        "compare/compare.png",
    ):
        assert (tmp_path / name).stat().st_size > 1000
    config = json.loads((tmp_path / "smoke" / "stage3" / "config.json").read_text())
    assert config["moellava"]["stage"] == "moe"
    assert "shuffled images" in first.stdout
    for words in ("max |Δlogit|", "«", "done in ", "Totals: ", "(right: ", "MoE against dense, equal time"):
        assert words in first.stdout

    again = run_demo(tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("done before") == 8
    assert "deepspeed" not in again.stdout


@pytest.mark.slow
def test_a_failing_stage_is_loud(tmp_path):
    """Base models that are not there: the demo stops at stage 1 and shows why."""
    code = (
        "import pathlib, sys; from moellava.commands.demo import main; from moellava.demo import demo; "
        f"demo.BASE = pathlib.Path({str(tmp_path)!r}); "
        f"sys.exit(main(['--smoke', '--processes', '1', '--output-dir', {str(tmp_path / 'run')!r}]))"
    )
    result = run([sys.executable, "-c", code], cwd=ROOT)
    assert result.returncode == 1
    assert "stage1.log" in result.stdout
    assert "The demo has stopped" in result.stdout
    assert not (tmp_path / "run" / "scores.json").exists()
