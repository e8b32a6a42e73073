# SPDX-License-Identifier: Apache-2.0
"""A lock is removed when, and only when, nobody holds it."""

import os

from moellava.train.deepspeed.extensions import extension_root, remove_abandoned_locks


def test_only_locks_without_an_owner_go(tmp_path):
    abandoned, held = tmp_path / "op_a" / "lock", tmp_path / "op_b" / "lock"
    for path in (abandoned, held):
        path.parent.mkdir()
    abandoned.touch()
    owner = os.open(held, os.O_CREAT | os.O_EXCL)  # as torch holds it
    try:
        assert remove_abandoned_locks(tmp_path) == [abandoned]
        assert held.exists()
    finally:
        os.close(owner)
    assert remove_abandoned_locks(tmp_path) == [held]


def test_nothing_is_removed_where_processes_cannot_be_seen(tmp_path):
    (tmp_path / "lock").touch()
    assert remove_abandoned_locks(tmp_path, processes=tmp_path / "no-proc") == []
    assert (tmp_path / "lock").exists()


def test_the_environment_names_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert extension_root() == tmp_path
