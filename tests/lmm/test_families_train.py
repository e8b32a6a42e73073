# SPDX-License-Identifier: Apache-2.0
"""The unusual architectures through train.py: a short run each, with a batch that has no image, and LoRA."""

import json

import pytest
import torch

from moellava.errors import UserError
from moellava.lmm.architecture import ARCHITECTURES
from tests.lmm.tiny import reopen


def trust(family_id):
    return {"trust_remote_code": True} if ARCHITECTURES[family_id].remote_code else {}


@pytest.fixture
def run_of(run):
    """(architecture, name of the run, flags) -> the folder that a run of three steps leaves, in this process."""
    return lambda family_id, name="run", **flags: run(
        family_id, name, model_max_length=1024, **trust(family_id), **flags
    )


def opened_again(folder, family_id):
    vlm = reopen(folder, **trust(family_id))
    assert vlm.architecture.name == family_id
    return vlm


def history(folder):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in log if "loss" in row]


SLOW = pytest.param("qwen-vl", marks=pytest.mark.slow)  # its vocabulary


@pytest.mark.parametrize("family_id", ["llama-3.2-vision", "paligemma", "smolvlm", SLOW, "phi3-v"])
def test_a_run_leaves_a_folder_that_opens(family_id, run_of, small_lmm):
    lora = {"use_lora": True, "lora_r": 2, "train_vision_projector": True}
    folder = run_of(family_id, "run", logging_steps=1, **lora)
    assert len(history(folder)) == 3
    before, after = (opened_again(path, family_id).model.state_dict() for path in (small_lmm(family_id), folder))
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    parts = json.loads((folder / "parameters.json").read_text())
    assert {part for part, row in parts.items() if row["trainable"]} == {"language_model", "projector"}
    assert moved and set(before) == set(after)


@pytest.mark.parametrize("family_id", ["llama-3.2-vision", "paligemma"])
def test_a_sparse_run_has_an_exact_start(family_id, run_of):
    folder = run_of(family_id, "sparse", moe_enable=True, moe_mode="dense", num_experts=2, max_steps=1)
    certificate = json.loads((folder / "moe_certificate.json").read_text())
    assert all(probe["max_abs_delta"] < 1e-5 for probe in certificate["probes"].values())


def test_code_of_their_own_is_not_upcycled(run_of):
    with pytest.raises(UserError, match="--moe_enable True: the decoder of phi3-v models is code"):
        run_of("phi3-v", moe_enable=True)
