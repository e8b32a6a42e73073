"""The unusual architectures through train.py: a short run each, with a batch that has no image, and LoRA."""

import json

import pytest
import torch

from moellava.errors import UserError
from moellava.lmm.architecture import ARCHITECTURES
from moellava.lmm.loaders import find_model, load_lmm
from moellava.train.arguments import parse_arguments
from moellava.train.train import train


def trust(family_id):
    return {"trust_remote_code": True} if ARCHITECTURES[family_id].remote_code else {}


@pytest.fixture
def run(tiny_lmm, released_flags):
    """(family, flags) -> the folder that a run of three steps leaves, in this process."""

    def start(family_id, name="run", **flags):
        flags |= {"model_max_length": 1024, **trust(family_id)}
        flags = released_flags(tiny_lmm(family_id), name, **flags)
        return train(*parse_arguments([str(word) for key, value in flags.items() for word in (f"--{key}", value)]))

    return start


def opened_again(folder, family_id):
    found = find_model(None, str(folder))
    assert found[2].name == family_id
    return load_lmm(*found, dtype=torch.float32, **trust(family_id))


def history(folder):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in log if "loss" in row]


SLOW = pytest.param("qwen-vl", marks=pytest.mark.slow)  # its vocabulary


@pytest.mark.parametrize("family_id", ["llama-3.2-vision", "paligemma", "smolvlm", SLOW, "phi3-v"])
def test_a_run_leaves_a_folder_that_opens(family_id, run, tiny_lmm):
    lora = {"use_lora": True, "lora_r": 2, "train_vision_projector": True}
    folder = run(family_id, "run", logging_steps=1, **lora)
    assert len(history(folder)) == 3
    before, after = (opened_again(path, family_id).model.state_dict() for path in (tiny_lmm(family_id), folder))
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    parts = json.loads((folder / "parameters.json").read_text())
    assert {part for part, row in parts.items() if row["trainable"]} == {"language_model", "projector"}
    assert moved and set(before) == set(after)


@pytest.mark.parametrize("family_id", ["llama-3.2-vision", "paligemma"])
def test_a_sparse_run_has_an_exact_start(family_id, run):
    folder = run(family_id, "sparse", moe_enable=True, moe_mode="dense", num_experts=2, max_steps=1)
    certificate = json.loads((folder / "moe_certificate.json").read_text())
    assert all(probe["max_abs_delta"] < 1e-5 for probe in certificate["probes"].values())


def test_code_of_their_own_is_not_upcycled(run):
    with pytest.raises(UserError, match="--moe_enable True: the decoder of phi3-v models is code"):
        run("phi3-v", moe_enable=True)
