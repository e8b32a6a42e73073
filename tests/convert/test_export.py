"""`moellava export`: what it writes, and what it refuses to. (tests/model/test_published.py has the layout itself.)"""

from __future__ import annotations

import pytest
import torch

from moellava.cli import main
from moellava.convert.export import flat_rope, write_published
from moellava.errors import UserError
from moellava.model.builder import load_pretrained_model, save_pretrained_folder
from moellava.model.compose import compose
from moellava.moe import MoESpec, upcycle


def test_the_command_writes_a_folder_that_opens(make_base, clip_tower, inputs, tmp_path, capsys):
    made = compose(str(make_base("stablelm").folder), str(clip_tower), version="plain")
    save_pretrained_folder(made.model, made.tokenizer, made.processor, tmp_path / "ours")
    arguments = ["export", "--model-path", str(tmp_path / "ours"), "--output-dir", str(tmp_path / "theirs")]
    assert main(arguments) == 0
    tokenizer, model, _, _ = load_pretrained_model(tmp_path / "theirs", device="cpu")
    assert tokenizer.get_vocab() == made.tokenizer.get_vocab()
    assert model.config.image_token_index == made.model.config.image_token_index
    batch = inputs(model)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, made.model(**batch).logits)
    assert main(arguments) == 2
    assert "already holds a model" in capsys.readouterr().err


def test_rope_goes_back_to_its_old_names():
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    assert flat_rope({"hidden_size": 8, "rope_parameters": rope}) == {
        "hidden_size": 8,
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    assert flat_rope({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})["rope_scaling"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "shared"}, "a shared expert"),
        ({"router_balance": "bias"}, "a balancing bias"),
        ({"top_k_experts": 1}, "top-1 gates of value 1"),
        ({"top_k_experts": 3}, "top-3 routing"),
    ],
)
def test_routing_that_moe_llava_lacks_is_not_written(options, message, make_base, clip_tower, tmp_path):
    model = compose(str(make_base("llama").folder), str(clip_tower), version="plain").model
    upcycle(model, MoESpec(num_experts=[4], **options))
    with pytest.raises(UserError, match=message):
        write_published(model, None, tmp_path)


def test_a_biased_head_is_not_written(make_base, clip_tower, tmp_path):
    made = compose(str(make_base("phi").folder), str(clip_tower), version="plain")
    with pytest.raises(UserError, match="head has a bias"):
        write_published(made.model, made.tokenizer, tmp_path)
