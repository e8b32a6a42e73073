# SPDX-License-Identifier: Apache-2.0
"""`moellava export --to llava`: what it writes, and what it refuses to. (The layout itself:
tests/model/test_published.py.)"""

from __future__ import annotations

import pytest
import torch

from moellava.cli import main
from moellava.convert.export.llava import flat_rope, write_published
from moellava.errors import UserError
from moellava.moe import MoESpec, upcycle
from tests.tiny import compose_tiny, reopen


def test_the_command_writes_a_folder_that_opens(make_base, clip_tower, inputs, tmp_path, capsys):
    made = compose_tiny(make_base("stablelm").folder, clip_tower, "plain")
    made.save(tmp_path / "ours")
    arguments = [
        "export",
        "--model-path",
        str(tmp_path / "ours"),
        "--output-dir",
        str(tmp_path / "theirs"),
        "--to",
        "llava",
    ]
    assert main(arguments) == 0
    theirs = reopen(tmp_path / "theirs")
    model = theirs.model
    assert theirs.tokenizer.get_vocab() == made.tokenizer.get_vocab()
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
    made = compose_tiny(make_base("llama").folder, clip_tower, "plain")
    upcycle(made.model, MoESpec(num_experts=[4], **options))
    with pytest.raises(UserError, match=message):
        write_published(made, tmp_path)


def test_a_biased_head_is_not_written(make_base, clip_tower, tmp_path):
    made = compose_tiny(make_base("phi").folder, clip_tower, "plain")
    with pytest.raises(UserError, match="head has a bias"):
        write_published(made, tmp_path)
