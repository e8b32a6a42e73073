# SPDX-License-Identifier: Apache-2.0
"""Every way to start training leads to the same run: the module under a launcher, and the file itself."""

from __future__ import annotations

import sys

import pytest

from tests.processes import PROGRAMS, ROOT, free_port, run, words_of

STARTS = {
    "torchrun": [str(PROGRAMS / "torchrun"), "--nproc-per-node", "1", "--master_port", "PORT", "-m", "moellava.train"],
    "file": [sys.executable, str(ROOT / "moellava" / "train" / "train.py")],
}
"""`deepspeed --module moellava.train` is what the demo types (tests/demo/test_demo.py), `moellava train` stands in
docs/QUICKSTART.md, and `train.py` is what the other tests start."""


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_a_run_starts_and_ends(start, tmp_path, flags_for, losses_of):
    """Beside that file lies a folder named `deepspeed`, which Python would take for the package."""
    flags = flags_for(tmp_path, "pretrain") | {"max_steps": 1, "save_strategy": "no", "deepspeed": "zero2"}
    words = [str(free_port()) if word == "PORT" else word for word in STARTS[start]]
    done = run([*words, *words_of(flags)], fresh=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses_of(tmp_path / "pretrain")
