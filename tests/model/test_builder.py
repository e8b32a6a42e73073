"""`load_pretrained_model`, as LLaVA's users call it."""

from __future__ import annotations

import pytest
import torch

from moellava.model.builder import load_pretrained_model
from tests.processes import run_python
from tests.tiny import compose_tiny


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
