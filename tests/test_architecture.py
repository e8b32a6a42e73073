# SPDX-License-Identifier: Apache-2.0
"""The rooms of the package: imports run downward, deepspeed stays where training is, modules stay short."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "moellava"
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in MODULES]

FLOORS = [
    {"constants", "errors", "heap", "log", "processes", "startup", "auto_classes"},
    {"registry"},
    {"files"},
    {"plugins", "recipes"},
    {"conversation"},
    {"data"},
    {"mm_utils"},
    {"moe"},
    {"model"},
    {"lmm"},
    {"vlm"},
    {"batches"},
    {"serve", "adapters", "vis"},
    {"eval"},
    {"convert"},
    {"doctor"},
    {"train"},
    {"plan"},
    {"compare", "demo"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
"""From the ground up. A room may import from itself and from the floors below it."""

FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
NEVER = {"moe": {"data"}}
"""Downward imports that are refused all the same: MoE layers know no data."""

FACES = {"model/builder.py", "serve/cli.py"}
"""Names that LLaVA and MoE-LLaVA know something by: they pass on what lies above, and nobody imports them."""

DOCUMENTED = {
    "torch._subclasses.fake_tensor.FakeTensorMode",  # docs.pytorch.org, 'Fake tensor'
    "torch.utils._python_dispatch.TorchDispatchMode",  # docs.pytorch.org, 'Extending PyTorch'
}
"""Private by their names alone: torch's manual names these as the way to do it, and there is no other."""

DEEPSPEED_ROOMS = ("moe/deepspeed", "train/")
"""Where deepspeed may be imported: inference never needs it."""


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import of a module, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            # `from moellava import moe` names a room in its alias; `from moellava.moe import x` does not.
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def room_of(dotted: str) -> str | None:
    """'moellava.data.masking' -> 'data'; None for what is not a room of ours."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "moellava" and len(parts) > 1 and parts[1] in FLOOR_OF else None


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_imports_run_downward(path):
    relative = path.relative_to(PACKAGE)
    if relative.name == "__init__.py" and len(relative.parts) == 1:
        return  # names of all rooms, each imported when it is used: tests/test_startup.py
    if relative.as_posix() in FACES:
        return
    room = relative.parts[0].removesuffix(".py")
    assert room in FLOOR_OF, f"{room} has no floor: add it to FLOORS"
    wrong = [
        f"line {line}: {name}"
        for name, line in imported(path)
        if (other := room_of(name))
        and other != room
        and (FLOOR_OF[other] >= FLOOR_OF[room] or other in NEVER.get(room, ()))
    ]
    assert not wrong, f"{relative} imports from its own floor or above: {wrong}"


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_deepspeed_is_imported_where_training_is(path):
    where = path.relative_to(PACKAGE).as_posix()
    lines = [line for name, line in imported(path) if name.split(".")[0] == "deepspeed"]
    assert not lines or where.startswith(DEEPSPEED_ROOMS), f"{where} imports deepspeed in lines {lines}"


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_nothing_private_of_other_packages_is_imported(path):
    private = [
        f"line {line}: {name}"
        for name, line in imported(path)
        if name not in DOCUMENTED
        and any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
    ]
    assert not private, private


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_modules_and_functions_stay_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400, "over 400 lines: which two ideas live here?"
    long = [
        f"line {node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 75
    ]
    assert not long, long


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_nobody_comes_in_by_a_face(path):
    faces = {f"moellava.{face.removesuffix('.py').replace('/', '.')}" for face in FACES}
    wrong = [f"line {line}: {name}" for name, line in imported(path) if name.rpartition(".")[0] in faces]
    assert not wrong, wrong


def test_every_room_has_a_floor():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES} - {"__init__"}
    assert rooms <= set(FLOOR_OF)


GIVEN_UP = {"kind": "the precise word: modality, layout, family …", "as of `": "See `…`"}
"""Words that CONTRIBUTING.md's glossary has given up -> what is said instead."""


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_one_word_per_thing(path):
    text = path.read_text(encoding="utf-8")
    found = [word for word in GIVEN_UP if re.search(rf"\b{re.escape(word)}", text, re.IGNORECASE)]
    assert not found, {word: GIVEN_UP[word] for word in found}


def test_the_glossary_is_short():
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line for line in page.split("## Words")[1].split("## ")[0].splitlines() if line.startswith("| ")]
    assert 10 < len(rows) - 1 <= 25


TOP = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Dockerfile", "mkdocs.yml", "pyproject.toml"}
TOP |= {"setup.py", "train.py", "constraints.txt"}
"""Files of the project's first page."""


def test_nothing_but_the_project_lies_at_its_top():
    """Notes that somebody makes while working are not committed by mistake."""
    root = PACKAGE.parent
    found = subprocess.run(["git", "-C", str(root), "ls-files"], capture_output=True, text=True, check=False)
    kept = found.stdout.splitlines() if found.returncode == 0 else [path.name for path in root.iterdir()]
    files = {name for name in kept if "/" not in name and not name.startswith(".") and (root / name).is_file()}
    assert files == TOP
