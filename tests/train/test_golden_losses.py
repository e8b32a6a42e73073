# SPDX-License-Identifier: Apache-2.0
"""The losses of the stages are what they have always been: `tests/golden/losses.json`, made before the models were one.

That file holds six steps of each stage, in fp32 and one process, by the code that still had composed and released
models apart. It is made anew only where a change of the numbers is meant.
"""

from __future__ import annotations

import json

import pytest
import torch

from tests.conftest import GOLDEN
from tests.processes import losses_of, train_here

RUNS = {"pretrain": {}, "finetune": {}, "moe": {}, "moe-llava": {"moe_preset": "moe-llava"}}
"""Run -> what is added to the flags of its stage. The last one is stage 3 with the original's routing and loss."""

PROCESSORS_DIFFER = 1e-5
"""As a fraction of a loss: vector units of other widths add in another order."""


@pytest.fixture
def one_thread():
    """Sums in the order in which the numbers were made."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_six_steps_of_each_stage(one_thread, flags_for, tmp_path):
    golden = json.loads((GOLDEN / "losses.json").read_text())
    assert golden.keys() == RUNS.keys()
    for run, added in RUNS.items():
        flags = flags_for(tmp_path, "moe" if "moe" in run else run) | {"output_dir": tmp_path / run} | added
        losses = losses_of(train_here(flags))
        expected = {int(step): loss for step, loss in golden[run].items()}
        assert losses == pytest.approx(expected, rel=PROCESSORS_DIFFER), run
