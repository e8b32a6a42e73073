# SPDX-License-Identifier: Apache-2.0
"""Two runs never share a folder, and a lock dies with its process."""

from __future__ import annotations

import os
import re
import signal

import pytest

from moellava.errors import UserError
from moellava.train.lock import LOCK, locked


def hold(folder, pipe):
    """A child that holds a folder until it is killed; `pipe` gets a byte when it does."""
    child = os.fork()
    if child == 0:
        with locked(folder):
            os.write(pipe, b"x")
            signal.pause()
    return child


def test_a_second_run_is_refused_until_the_first_has_died(tmp_path):
    folder = tmp_path / "new" / "run"
    read, write = os.pipe()
    child = hold(folder, write)
    try:
        assert os.read(read, 1) == b"x"
        with pytest.raises(UserError, match=re.escape(f"--output_dir {folder} is in use by process {child} on ")):
            locked(folder).__enter__()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (folder / LOCK).exists(), "SIGKILL cleans up nothing"
    with locked(folder):
        assert str(os.getpid()) in (folder / LOCK).read_text()
    assert not (folder / LOCK).exists()
    assert folder.exists()


def test_a_folder_that_nothing_came_into_goes_again(tmp_path):
    with locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/run"):
        with pytest.raises(UserError, match="--output_dir .*file.* cannot be written: "):
            locked(tmp_path / name).__enter__()
