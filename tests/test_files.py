# SPDX-License-Identifier: Apache-2.0
"""Files: written whole or not at all, read or named, found where a name leads."""

from __future__ import annotations

import ast
import os
import signal
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from moellava import files
from moellava.errors import UserError
from moellava.files import (
    DIGESTS,
    STAGING,
    file_digest,
    read_config,
    read_digests,
    read_json,
    require_new_folder,
    resolve_folder,
    staged,
    write_json,
    written,
)
from tests.processes import no_file_above, run

FIRST, SECOND = b"what was there", b"what is new"


def contents(folder: Path) -> dict[str, bytes]:
    """name -> content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def old(tmp_path) -> Path:
    """A file with an old content, alone in its folder."""
    (tmp_path / "weights.bin").write_bytes(FIRST)
    return tmp_path / "weights.bin"


def moves(monkeypatch) -> list[str]:
    """The names that files are moved to from now on, in order."""
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (moved.append(target.name), replace(source, target)))
    return moved


# -- one file ------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_when_the_block_ends(old):
    with written(old) as path:
        path.write_bytes(SECOND)
        assert old.read_bytes() == FIRST, "nothing is seen before"
    assert contents(old.parent) == {"weights.bin": SECOND}
    assert old.stat().st_mode & 0o777 == 0o644


def test_an_error_in_the_block_leaves_the_old_file(old):
    with pytest.raises(RuntimeError, match="half way"), written(old) as path:
        path.write_bytes(SECOND[:4])
        raise RuntimeError("half way")
    assert contents(old.parent) == {"weights.bin": FIRST}


def test_a_write_that_fails_half_way_leaves_the_old_file(old):
    with pytest.raises(OSError, match="File too large"), no_file_above(1000), written(old) as path:
        path.write_bytes(bytes(2000))
    assert contents(old.parent) == {"weights.bin": FIRST}


def test_a_block_that_writes_nothing_is_an_error_and_leaves_the_old_file(old):
    with pytest.raises(FileNotFoundError), written(old):
        pass
    assert contents(old.parent) == {"weights.bin": FIRST}


def test_a_file_is_on_the_disk_before_it_takes_its_place(old, monkeypatch):
    moved, flushed = moves(monkeypatch), []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(len(moved)))
    with written(old) as path:
        path.write_bytes(SECOND)
    assert (flushed, moved) == ([0], ["weights.bin"])


def test_json_comes_back(tmp_path):
    content = {"name": "naïve 🐱", "layers": [1, 2.5, None]}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"model": object()})
    assert read_json(tmp_path / "a.json") == content and list(tmp_path.iterdir()) == [tmp_path / "a.json"]


# -- several files -------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder that holds a model, and a file that no model has."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "notes.txt"):
        (folder / name).write_bytes(FIRST)
    return folder


def fill(folder: Path) -> None:
    """A new model's files, `config.json` first."""
    for name in ("config.json", "model.safetensors", "added.json"):
        (folder / name).write_bytes(SECOND)


def test_files_move_up_with_config_json_last(model, monkeypatch):
    moved = moves(monkeypatch)
    with staged(model, ".new") as folder:
        fill(folder)
        assert moved == [] and (model / "config.json").read_bytes() == FIRST
    assert moved == ["added.json", DIGESTS, "model.safetensors", "config.json"]
    new = dict.fromkeys(("config.json", "model.safetensors", "added.json"), SECOND)
    recorded = read_digests(model)
    (model / DIGESTS).unlink()
    assert contents(model) == new | {"notes.txt": FIRST}
    assert recorded == {name: file_digest(model / name) for name in new}
    assert not (model / ".new").exists()


def test_all_files_are_on_the_disk_before_one_moves(model, monkeypatch):
    moved, flushed = moves(monkeypatch), []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(len(moved)))
    with staged(model, ".new") as folder:
        fill(folder)
    assert flushed == [0, 0, 0, 0, 0, 4], "three files, their digests and their folder, then what the move has changed"


def test_an_error_in_the_block_leaves_the_old_folder(model):
    before = contents(model)
    with pytest.raises(RuntimeError, match="half way"), staged(model, ".new") as folder:
        fill(folder)
        raise RuntimeError("half way")
    assert contents(model) == before and not (model / ".new").exists()


def test_a_write_that_fails_half_way_leaves_the_old_folder(model):
    before = contents(model)
    with pytest.raises(OSError, match="File too large"), no_file_above(1000), staged(model, ".new") as folder:
        fill(folder)
        (folder / "model.safetensors").write_bytes(bytes(2000))
    assert contents(model) == before and not (model / ".new").exists()


def test_a_new_folder_is_gone_after_an_error_and_there_without_one(tmp_path):
    target = tmp_path / "a" / "model"
    with pytest.raises(RuntimeError), staged(target, ".new") as folder:
        fill(folder)
        raise RuntimeError
    assert not target.exists()
    with staged(target, ".new") as folder:
        fill(folder)
    assert set(contents(target)) == {"config.json", "model.safetensors", "added.json", DIGESTS}


def test_what_a_kill_has_left_does_not_stand_in_the_way_of_the_same_command_again(tmp_path):
    """Whichever command it was: all of them stage under one name, of which `require_new_folder` knows."""
    staging = [
        (path.name, ast.unparse(node.args[1]))
        for path in Path(files.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "staged"
    ]
    assert len(staging) >= 6 and {name for _, name in staging} == {"STAGING"}
    (tmp_path / "new" / STAGING).mkdir(parents=True)
    (tmp_path / "new" / STAGING / "model.safetensors").write_bytes(FIRST)
    assert require_new_folder(tmp_path / "new", "--output-dir") == tmp_path / "new"
    with staged(tmp_path / "new", STAGING) as folder:
        fill(folder)
    assert set(contents(tmp_path / "new")) == {"config.json", "model.safetensors", "added.json", DIGESTS}
    with pytest.raises(UserError, match="already holds a model"):
        require_new_folder(tmp_path / "new", "--output-dir")


def test_what_a_killed_run_has_staged_does_not_come_along(model):
    (model / ".new").mkdir()
    (model / ".new" / "stale.json").write_bytes(FIRST)
    with staged(model, ".new") as folder:
        fill(folder)
    assert "stale.json" not in contents(model) and not (model / ".new").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from moellava.files import staged, written
folder, how = Path(sys.argv[1]), sys.argv[2]
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with staged(folder, ".new") if how == "staged" else written(folder / "config.json") as new:
    (new / "config.json" if how == "staged" else new).write_text("half")
"""


@pytest.mark.parametrize("how", ["staged", "written"])
def test_a_kill_before_the_move_leaves_the_old_files(how, model):
    before = contents(model)
    assert run([sys.executable, "-c", KILLED, str(model), how], fresh=True).returncode == -signal.SIGKILL
    assert contents(model).items() > before.items(), "with what was to replace them beside it"


# -- reading -------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_empty_and_a_broken_one_is_named(tmp_path):
    assert read_json(tmp_path / "none.json") == {}
    for broken in (b'{"a": ', b"", b"\xff\xfe"):
        (tmp_path / "a.json").write_bytes(broken)
        with pytest.raises(UserError, match=r"a\.json is not valid JSON"):
            read_json(tmp_path / "a.json")


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="--model-path .*model.safetensors is a file: a folder, or an id of the hub"):
        resolve_folder(tmp_path / "model.safetensors", "--model-path")


def test_a_config_that_is_none_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--model-path .* holds no config.json"):
        read_config(tmp_path, "--model-path")
    for step in (5, 500, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a model folder. Its run has not ended: .* last checkpoint, .*-1000\.$"):
        read_config(tmp_path, "--model-path")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="It is an adapter: `moellava merge-lora --model-path BASE --adapter"):
        read_config(tmp_path, "--model-path")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_config(tmp_path, "--model-path")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list where a JSON object"):
        read_config(tmp_path, "--model-path")
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    assert read_config(tmp_path, "--model-path") == {"model_type": "llava"}


# -- where a name leads --------------------------------------------------------------------------------------------


def test_a_relative_name_is_looked_for_around_the_folder_that_names_it(tmp_path):
    (tmp_path / "openai" / "tower").mkdir(parents=True)
    (tmp_path / "family" / "dense").mkdir(parents=True)
    found = resolve_folder("openai/tower", "the tower", near=tmp_path / "family" / "dense")
    assert found.samefile(tmp_path / "openai" / "tower")


def test_any_other_name_is_fetched(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, allow_patterns: (asked.append((name, allow_patterns)), str(tmp_path))[1],
    )
    assert resolve_folder("org/model", "--model-path", patterns=("*.json",)) == tmp_path
    assert asked == [("org/model", ["*.json"])]
    assert resolve_folder(tmp_path, "--model-path") == tmp_path and len(asked) == 1, "a folder is not asked for"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("org/model", LocalEntryNotFoundError("no network\nand more of it")),
        ("org/model", OSError("no network")),
        ("/no/such/folder", None),  # refused by the hub's own check of names
    ],
)
def test_a_name_that_leads_nowhere_is_named_with_its_flag(name, error, monkeypatch):
    if error is not None:

        def fail(*_, **__):
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=rf"--image_tower {name}: there is no such folder") as caught:
        resolve_folder(name, "--image_tower")
    assert "\n" not in str(caught.value)
