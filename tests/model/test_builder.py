# SPDX-License-Identifier: Apache-2.0
"""`load_pretrained_model`, as LLaVA's users call it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from moellava.errors import UserError
from moellava.model.builder import load_pretrained_model
from moellava.moe import MoESpec, upcycle
from moellava.vlm import open_vlm
from tests.processes import run_python
from tests.tiny import batch_for, compose_tiny


@pytest.fixture(scope="module")
def made(make_base, clip_tower):
    return compose_tiny(make_base("llama").folder, clip_tower, "plain", image_projector_type="mlp2x_gelu")


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("builder") / "model"
    made.save(path, meta={"stage": "pretrain"})
    return path


def test_what_comes_back_is_what_was_saved(made, folder):
    tokenizer, model, processor, context = load_pretrained_model(folder, device="cpu")
    assert context == 512 and not model.training
    assert tokenizer.get_vocab() == made.tokenizer.get_vocab()
    assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert processor.chat_template == made.processor.chat_template
    for (name, tensor), (other, found) in zip(made.model.state_dict().items(), model.state_dict().items(), strict=True):
        assert name == other and torch.equal(tensor, found)


def test_arguments_stand_where_llava_has_them(checkpoints, tokenizer_folder):
    """(path, base, name): the name, which LLaVA searched for a class, says nothing."""
    tokenizer, model, _, _ = load_pretrained_model(
        checkpoints / "llama/dense", tokenizer_folder, "no-llava", dtype=torch.bfloat16, device="cpu"
    )
    assert tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_index == 280
    assert model.dtype == torch.bfloat16


OPENS = """
import sys
from moellava.model.builder import load_pretrained_model
load_pretrained_model(sys.argv[1], device="cpu")
assert "deepspeed" not in sys.modules
"""


@pytest.mark.slow
def test_inference_imports_no_deepspeed(folder):
    run_python(OPENS, folder)


def test_four_and_eight_bits_act_and_devices_are_one(folder):
    _, model, _, _ = load_pretrained_model(folder, None, None, False, True, device_map="cpu", device="cpu")
    names = {type(module).__name__ for module in model.modules()}
    assert "Linear4bit" in names and model.is_loaded_in_4bit
    _, model, _, _ = load_pretrained_model(folder, load_8bit=True, device_map={"": "cpu"})
    assert "Linear8bit" in {type(module).__name__ for module in model.modules()}
    for wrong, words in (
        ({"load_4bit": True, "load_8bit": True}, "load_8bit=True and load_4bit=True"),
        ({"device_map": {"model": 0, "lm_head": "cpu"}}, "device_map=.* opened on one device"),
        ({"device_map": "balanced"}, "device_map='balanced'"),
        ({"device_map": "cpu", "device": "cuda"}, "name two devices"),
    ):
        with pytest.raises(UserError, match=words):
            load_pretrained_model(folder, **wrong)


def same_after(copied, model, inputs) -> bool:
    """Whether a copy of a model that has run computes the same."""
    with torch.inference_mode():
        return torch.equal(copied.eval()(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True])
def test_a_model_pickles_and_copies_after_a_forward_and_a_backward(sparse, folder, tmp_path):
    vlm = open_vlm(folder, device="cpu", dtype=torch.float32)
    if sparse:
        spec = MoESpec(num_experts=2, top_k_experts=1, router_balance="bias")
        upcycle(vlm.model, spec)
        vlm.sparse(spec)
    inputs = batch_for(vlm.model)
    vlm.model.train()(**inputs).logits.sum().backward()
    assert same_after(copy.deepcopy(vlm.model), vlm.model, inputs)
    assert same_after(pickle.loads(pickle.dumps(vlm.model)), vlm.model, inputs)
    if sparse:  # an extended class is found by a process that has not made it
        (tmp_path / "model.pkl").write_bytes(pickle.dumps(vlm.model))
        run_python(f"import pickle; pickle.load(open({str(tmp_path / 'model.pkl')!r}, 'rb'))")
