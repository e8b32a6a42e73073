# SPDX-License-Identifier: Apache-2.0
"""docs/QUICKSTART.md and docs/PYTHON.md do what they say: from the wheel alone, command by command, word for word."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from moellava import __version__, train
from moellava.demo.demo import BASE
from moellava.train.arguments import parse_arguments
from tests.processes import ROOT, run

QUICKSTART, PYTHON = ROOT / "docs" / "QUICKSTART.md", ROOT / "docs" / "PYTHON.md"


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def write_files(folder: Path) -> list[Path]:
    """What the page shows as files: the script that draws the data, and the runs, which are returned."""
    (script,) = blocks(QUICKSTART, "python")
    (folder / "make_data.py").write_text(script)
    runs = []
    for text in blocks(QUICKSTART, "yaml"):
        runs.append(folder / text.splitlines()[0].removeprefix("# "))
        runs[-1].write_text(text)
    return runs


def commands() -> list[list[str]]:
    """The words of the page's commands, in order."""
    lines = "".join(blocks(QUICKSTART, "bash")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line]


def test_the_runs_of_the_page_parse_and_follow_each_other(tmp_path):
    runs = write_files(tmp_path)
    first, second, third = (parse_arguments([str(path)]) for path in runs)
    assert first[0].tune_mm_mlp_adapter and third[2].moe_enable
    assert (second[0].model_name_or_path, third[0].model_name_or_path) == (first[3].output_dir, second[3].output_dir)
    named = [words[2] for words in commands() if words[:2] == ["moellava", "train"]]
    assert named == [path.name for path in runs]


def install_wheel(folder: Path) -> Path:
    """Builds the wheel of what is in the repository now, and installs it alone into a folder, which is returned."""
    source, wheels, target = (folder / name for name in ("source", "wheels", "target"))
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "moellava", source / "moellava", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)], fresh=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.glob("*.whl")
    done = run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], fresh=True)
    assert done.returncode == 0, done.stderr
    carried = {path.relative_to(source) for path in (source / "moellava").rglob("*") if path.is_file()}
    lost = sorted(str(path) for path in carried if not (target / path).is_file())
    assert not lost, f"setup.py leaves them out of the wheel: {lost}"
    return target


@pytest.mark.slow
def test_a_newcomer_with_the_wheel_follows_the_page_to_a_chat_with_a_sparse_model(tmp_path):
    target, home = install_wheel(tmp_path), tmp_path / "home"
    home.mkdir()
    write_files(home)
    alone = {"PYTHONPATH": str(target), "PATH": f"{target / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    where = run([sys.executable, "-c", "import moellava; print(moellava.__file__)"], env=alone, cwd=home, fresh=True)
    assert Path(where.stdout.strip()).is_relative_to(target), "the repository's own code would be tested"

    said = {}
    for words in commands():
        if words[0] == "pip":  # what `install_wheel` has done, and the environment of the tests
            continue
        program = sys.executable if words[0] == "python" else str(target / "bin" / words[0])
        done = run([program, *words[1:]], env=alone, cwd=home, fresh=True)
        assert done.returncode == 0, f"{shlex.join(words)}:\n{done.stdout}{done.stderr[-3000:]}"
        said[words[1]] = done.stdout
    assert f"moellava {__version__}" in said["env"] and "no problem found" in said["check-data"]
    shown = json.loads((home / "chats.json").read_text())[0]["conversations"]
    assert said["chat"].strip() == shown[1]["value"], "the model has learnt what its own data show"
    assert "moe" in json.loads((home / "stage3" / "config.json").read_text())
    assert (home / "qwen3-pretrain.yaml").is_file() and (home / "stage3" / "run.yaml").is_file()


@pytest.mark.slow
def test_the_page_about_python_runs_in_one_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    exec(compile((tmp_path / "make_data.py").read_text(), "make_data.py", "exec"), {})
    (tmp_path / "base").symlink_to(BASE)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks(PYTHON, "python")):
        exec(compile(block, f"PYTHON.md, block {number}", "exec"), names)
    assert names["train"] is train
    assert (tmp_path / "python" / "again" / "run.yaml").is_file()
