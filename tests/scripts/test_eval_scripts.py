# SPDX-License-Identifier: Apache-2.0
"""A script for every task, all through one: what it types, and that a real one runs."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest

from moellava.commands.eval import parser
from moellava.eval.suite import BENCHMARKS
from tests.eval.miniatures import write_all
from tests.processes import ROOT, environment, run
from tests.tiny import compose_tiny

SCRIPTS = ROOT / "scripts" / "v1" / "eval"
JUDGED = {"llava-bench", "mm-vet"}
NOWHERE = {"MODEL": "checkpoints/m", "NPROC": "2", "DRY_RUN": "1"}


def typed(task: str, *flags: str, **variables: str) -> dict[str, object]:
    """The values of the flags that a script types."""
    finished = run(["bash", str(SCRIPTS / f"{task}.sh"), *flags], env=environment() | variables)
    assert finished.returncode == 0, finished.stderr
    words = shlex.split(finished.stdout)
    assert words[:2] == ["moellava", "eval"]
    return vars(parser().parse_args(words[2:]))


def test_every_task_has_a_script():
    assert {path.stem for path in SCRIPTS.glob("*.sh")} == {*BENCHMARKS, "common"}
    texts = {task: (SCRIPTS / f"{task}.sh").read_text() for task in BENCHMARKS}
    assert all(text.splitlines()[-1] == f'evaluate {task} "$@"' for task, text in texts.items())


@pytest.mark.parametrize("task", ["easy-vqa", "mmbench-cn", "mm-vet"])
def test_what_a_script_types(task):
    variables = NOWHERE | {"DATA_FOLDER": "d", "SPLIT": "s", "AGAINST": "other", "BATCH": "4"}
    variables |= {"JUDGE_URL": "http://127.0.0.1", "JUDGE_MODEL": "j"}
    values = typed(task, "--limit", "7", **variables)
    assert values["task"] == [task] and values["model_path"] == "checkpoints/m"
    assert values["output_dir"] == Path("eval_results/m") and values["processes"] == 2
    assert (values["batch_size"], values["limit"], values["split"]) == (4, 7, "s")
    assert values["against"] == Path("other")
    assert values["data_folder"] == Path("d" if task != "easy-vqa" else "playground/data/eval")
    assert values["judge_model"] == ("j" if task in JUDGED else None)


def test_a_script_without_a_model_says_so():
    finished = run(["bash", str(SCRIPTS / "pope.sh")], env={k: v for k, v in os.environ.items() if k != "MODEL"})
    assert finished.returncode != 0 and "MODEL" in finished.stderr


@pytest.mark.slow
def test_a_script_scores(parts, tmp_path):
    write_all(tmp_path / "data")
    compose_tiny(parts / "lm", parts / "tower", "qwen").save(tmp_path / "model", meta={"version": "qwen"})
    own = {"MODEL": str(tmp_path / "model"), "DATA_FOLDER": str(tmp_path / "data"), "OUTPUT": str(tmp_path / "out")}
    command = ["bash", str(SCRIPTS / "mme.sh"), "--max-new-tokens", "2"]
    finished = run(command, env=environment() | own | {"NPROC": "1"})
    assert finished.returncode == 0, finished.stderr
    assert json.loads((tmp_path / "out" / "mme" / "result.json").read_text())["questions"] == 12
