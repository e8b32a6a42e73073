# SPDX-License-Identifier: Apache-2.0
"""docs/QUICKSTART.md and docs/PYTHON.md do what they say: from the wheel alone, command by command, word for word."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from moellava import __version__, train
from moellava.demo.demo import BASE
from moellava.train.arguments import parse_arguments
from tests.processes import ROOT, run

ALONE = {"PYTHONPATH": ""}
"""For a command of another environment, which is to find nothing of the repository."""

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


def required(package: str, extra: str) -> dict[str, Distribution]:
    """What pip installs for a package and one of its extras on this machine, by name, without the package itself."""
    found: dict[str, Distribution] = {}
    seen, asked = set(), [(package, extra)]
    while asked:
        name, extra = asked.pop()
        for needed in map(Requirement, distribution(name).requires or ()):
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                found[needed.name] = distribution(needed.name)
                asked += {(needed.name, more) for more in ("", *needed.extras)} - seen
                seen.update(asked)
    return found


def empty_environment(folder: Path, extra: str) -> Path:
    """An environment of what the wheel asks for and nothing else, linked from the tests' own; its interpreter."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    where = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], fresh=True, env=ALONE)
    site = Path(where.stdout.strip())
    for package in (required("moellava", "") | required("moellava", extra)).values():
        files = package.files or ()
        for top in {Path(file.parts[0]) for file in files if file.parts[0] != ".."}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(package.locate_file(top))))
    return python


def install_wheel(folder: Path, python: Path) -> None:
    """Builds the wheel of what is in the repository now, and installs it alone into an interpreter's environment."""
    source, wheels = folder / "source", folder / "wheels"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "moellava", source / "moellava", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)], fresh=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.glob("*.whl")
    done = run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], fresh=True, env=ALONE)
    assert done.returncode == 0, done.stderr
    where = run([str(python), "-c", "import moellava; print(moellava.__file__)"], env=ALONE, cwd=folder, fresh=True)
    target = Path(where.stdout.strip()).parent
    assert target.is_relative_to(python.parents[1]), "the repository's own code would be tested"
    carried = {path.relative_to(source / "moellava") for path in (source / "moellava").rglob("*") if path.is_file()}
    lost = sorted(str(path) for path in carried if not (target / path).is_file())
    assert not lost, f"setup.py leaves them out of the wheel: {lost}"


@pytest.mark.slow
def test_a_newcomer_with_the_wheel_follows_the_page_to_a_chat_with_a_sparse_model(tmp_path):
    python, home = empty_environment(tmp_path / "env", "train"), tmp_path / "home"
    install_wheel(tmp_path, python)
    home.mkdir()
    write_files(home)
    alone = ALONE | {"PATH": f"{python.parent}{os.pathsep}/usr/bin{os.pathsep}/bin"}

    said = {}
    for words in commands():
        if words[0] == "pip":  # what has been done
            continue
        done = run([str(python.parent / words[0]), *words[1:]], env=alone, cwd=home, fresh=True)
        assert done.returncode == 0, f"{shlex.join(words)}:\n{done.stdout}{done.stderr[-3000:]}"
        said[words[1]] = done.stdout
    assert f"moellava {__version__}" in said["env"] and "no problem found" in said["check-data"]
    assert re.search(r"datasets +-", said["env"]), "what the wheel does not ask for is not there"
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
