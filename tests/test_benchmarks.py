# SPDX-License-Identifier: Apache-2.0
"""Every benchmark still runs: at its smallest, so that its figures mean nothing."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ROOT

BENCHMARKS = ROOT / "benchmarks"

WORDS = {
    "archives": ["--pictures", "20", "--read", "5"],
    "data_index": ["--records", "300", "--only", "first index", "opening"],
    "engines": ["--processes", "1", "--only", "ZeRO-1", "--steps", "2", "--rounds", "1"],
    "generate": ["--sizes", "small", "--batches", "1", "--rounds", "1", "--tokens", "2"],
    "loss_memory": ["--case", "trained rows in chunks", "0.5", "--length", "64", "--vocabulary", "4096"],
    "moe_layer": ["--tokens", "64", "--experts", "4", "--repeats", "1"],
    "pictures": ["--rounds", "1", "--times", "1"],
    "plan_paper": ["--only", "dense, stage 2"],
    "preprocess": ["--conversations", "5", "--rounds", "1"],
    "shards": ["--pictures", "8"],
    "train_step": ["--steps", "2", "--stages", "stage 3", "--threads", "1"],
}
PRINTS = {"loss_memory"}
"""Those whose words have them print their figures and leave no file."""

ELSEWHERE = {
    "liger": "installs a package of 1 GB, which its parity is measured with; tests/train/test_loss.py has ours",
    "moe_worth": "trains for hours; tests/demo/test_mixed.py runs what it is made of",
    "peers": "how train_step and liger come by what they are measured beside",
    "plan": "runs of training, one after another; tests/plan and tests/train run what it is made of",
    "real_runs": "what engines, plan and upcycle share",
    "trl_peer": "a part of train_step, which installs a package when stages 1 and 2 are measured",
    "upcycle": "a model of 135 million parameters; tests/convert runs what it is made of",
    "upcycle_perplexity": "a model that comes as a package of 93 MB",
}
"""Those that are only loaded, and why."""


def started(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A benchmark, run as its page says."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def numbers(value: Any) -> Iterator[float]:
    """All numbers of some JSON."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def test_every_benchmark_is_run_or_says_why_not():
    assert {path.stem for path in BENCHMARKS.glob("*.py")} == WORDS.keys() | ELSEWHERE.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WORDS))
def test_a_benchmark_runs(name, tmp_path):
    file = tmp_path / "figures.json"
    done = started(name, *WORDS[name], *([] if name in PRINTS else ["--json", str(file)]))
    assert done.returncode in (0, 1), done.stderr  # 1: slower than it shall be, which one turn does not say
    text = done.stdout.splitlines()[-1] if name in PRINTS else Path(file).read_text(encoding="utf-8")
    figures = list(numbers(json.loads(text)))
    assert figures and all(map(math.isfinite, figures)) and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_the_others_can_be_loaded(name):
    done = started(name, "--help")
    assert done.returncode == 0, done.stderr
