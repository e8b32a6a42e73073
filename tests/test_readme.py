# SPDX-License-Identifier: Apache-2.0
"""What the pages say is true: commands parse, flags exist, links and paths lead somewhere, and no flag is left out."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest
from transformers import TrainingArguments as HFTrainingArguments

from moellava.cli import COMMANDS
from moellava.train.arguments import ARGUMENT_CLASSES, RENAMED_FLAGS, make_parser, parse_arguments

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
MADE = ("make_data.py",)
"""Scripts that a page shows."""
CAPTIONS_BEGIN = 30
"""Column of the README's tree in which its captions begin."""
ENGINES = ("vllm", "transformers")
ENGINE_FLAGS = {"--continuous-batching", "--enable-mixed-moe-lora-format", "--model-impl"}
"""Programs that serve exported models, and flags of theirs that pages name. They are not installed here."""
ASKED = ("--help", "--help_all", "--print_config")
"""What is asked of training without training."""
CLUSTER_FLAGS = {"--requeue", "--signal", "--gpus-per-node", "--ntasks-per-node", "--nv", "--ipc", "--stop-timeout"}
"""Of Slurm, of Apptainer and of Docker."""
TAKES_A_RUN = {"plan"}
"""Commands that read the flags of train.py beside their own."""
WITHHELD = "…"
"""Stands in a page's command for flags that the reader adds."""


def commands_of(page: Path) -> list[list[str]]:
    """The words of each command in a page's bash blocks, without variables set in front and without comments."""
    text = "\n".join(re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M))
    lines = text.replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    bare = [words[next((at for at, word in enumerate(words) if "=" not in word), 0) :] for words in split]
    return [words for words in bare if words]


@cache
def help_of(command: str) -> str:
    """What `moellava COMMAND --help` prints."""
    output = io.StringIO()
    asked = "--help_all" if command == "train" else "--help"
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        importlib.import_module(COMMANDS[command][0]).main([asked])
    return output.getvalue()


@cache
def train_flags() -> frozenset[str]:
    """Every spelling that train.py takes."""
    known = {option for action in make_parser()._actions for option in action.option_strings}
    return frozenset(known | set(RENAMED_FLAGS))


def flags_in(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def check_training(words: list[str]) -> None:
    """A command that trains: complete ones must pass every check that comes before loading."""
    start = next(at for at, word in enumerate(words) if word in ("train.py", "moellava.train", "train"))
    own = [word for word in words[start + 1 :] if word not in ASKED]
    if WITHHELD in own or own[:1] and own[0].endswith(".yaml"):  # whose content tests/test_quickstart.py reads
        assert flags_in(own) <= train_flags()
    elif own:
        parse_arguments(own)


def check_command(words: list[str]) -> None:
    """Fails if a reader who types the command would be told that it does not exist."""
    program, *rest = words
    if "train.py" in rest or "moellava.train" in rest or words[:2] == ["moellava", "train"]:
        check_training(words)
    elif program == "moellava":
        known = help_of(rest[0]) if rest[0] in COMMANDS else "--help"
        others = train_flags() if rest[0] in TAKES_A_RUN else frozenset()
        unknown = [flag for flag in flags_in(rest) - others if flag not in known]
        assert not unknown, f"{words}: {unknown}"
    elif words[:2] == ["python", "-c"]:
        compile(words[2], str(words), "exec")
    elif program in ("bash", "source", "python"):
        path = next((word for word in rest if not word.startswith("-")), None)
        if rest[:1] == ["-m"]:
            assert importlib.util.find_spec(rest[1]), words
        elif path:
            found = [ROOT / name for name in expand_braces(path)]
            assert path in MADE or all(name.exists() for name in found), words
    else:
        known = {"pre-commit", "export", "pip", "git", "cd", "du", "find", "pytest", *ENGINES}
        assert program in known, f"who knows {program!r}?"


def expand_braces(pattern: str) -> list[str]:
    """As bash does: 'a/{b,c}' -> a/b, a/c."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    parts = match[1].split(",")
    return [name for part in parts for name in expand_braces(pattern[: match.start()] + part + pattern[match.end() :])]


@page
def test_commands_are_known_and_parse(page):
    for words in commands_of(page):
        check_command(words)


@page
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    lost = [target for target in links if target and not (page.parent / target).exists()]
    assert not lost, lost
    named = re.findall(r"`(?:bash )?((?:moellava|scripts|tests|docs|playground|benchmarks)/[\w./{},-]*)`", text)
    missing = [name for path in named for name in expand_braces(path) if not (ROOT / name).exists()]
    # What a run leaves is not there before it.
    assert not [name for name in missing if not name.startswith("playground/runs")], missing


@page
def test_flags_named_in_prose_exist(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    named = {
        flag for code in re.findall(r"`([^`\n]+)`", prose) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)
    }
    known = train_flags() | {flag for name in COMMANDS for flag in re.findall(r"--[a-z][\w-]*", help_of(name))}
    launchers = {
        "--help",
        "--full",
        "--hostfile",
        "--num_accelerators",
        "--num_gpus",
        "--nproc-per-node",
        "--json",
        "--module",
        "--page",
    }
    theirs = launchers | ENGINE_FLAGS | CLUSTER_FLAGS
    assert named <= known | theirs, sorted(named - known - theirs)


def test_every_flag_of_ours_is_explained():
    ours = {field.name for cls in ARGUMENT_CLASSES for field in dataclasses.fields(cls)}
    ours -= {field.name for field in dataclasses.fields(HFTrainingArguments)}
    pages = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("TRAIN.md", "DATA.md", "MOE.md"))
    missing = [name for name in sorted(ours) if f"--{name}" not in pages]
    assert not missing, f"docs/TRAIN.md, DATA.md or MOE.md: {missing}"


def test_the_readmes_tree_is_the_repositorys():
    tree = re.search(r"^```text\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    assert tree
    folder = ROOT
    for line in tree[1].splitlines():
        names = line[:CAPTIONS_BEGIN].split()
        folder = folder if line.startswith(" ") else ROOT
        assert names and all((folder / name).exists() for name in names), line
        if line.strip() == names[0]:  # a folder without a caption: what follows lies in it
            folder = ROOT / names[0]


def test_the_readmes_first_screen_names_the_two_commands():
    first = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:20]
    for command in ("bash scripts/demo.sh", "bash scripts/test.sh", "moellava chat"):
        assert any(line.startswith(command) for line in first)


def test_ci_runs_the_readmes_command():
    assert "bash scripts/test.sh" in (ROOT / ".ci" / "run").read_text()
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)
