# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a step, against what one counts by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moellava.compare.flops import step_flops
from moellava.moe import MoESpec, expert_parameters, upcycle


def counted(model, batch, trained=None) -> int:
    chosen = list(model.parameters()) if trained is None else trained
    return step_flops(SimpleNamespace(model=model), chosen, batch | {"labels": batch["input_ids"].clone()})


def test_another_expert_a_token_costs_one_mlp_more(tiny_llava, batch):
    spec = lambda k: MoESpec(moe_mode="dense", top_k_experts=k)  # noqa: E731
    one, two = (counted(upcycle(tiny_llava(), spec(k)), batch) for k in (1, 2))
    text = tiny_llava().config.text_config
    matrices = 3 * 2 * text.hidden_size * text.intermediate_size
    tokens = int(batch["attention_mask"].sum())
    assert two - one == 3 * matrices * tokens * text.num_hidden_layers


def test_what_is_frozen_takes_no_gradient_of_its_weights(tiny_llava, batch):
    model = tiny_llava()
    whole, head = counted(model, batch), counted(model, batch, list(model.lm_head.parameters()))
    assert 0 < head < whole
    assert counted(model, batch) == whole


def test_experts_alone(tiny_llava, batch):
    model = upcycle(tiny_llava(), MoESpec(moe_mode="dense"))
    assert counted(model, batch, list(expert_parameters(model))) < counted(model, batch)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_counts(tiny_llava, batch, implementation):
    model = tiny_llava()
    model.set_attn_implementation(implementation)
    longer = {name: torch.cat([value, value], 1) if name != "pixel_values" else value for name, value in batch.items()}
    longer["pixel_values"] = torch.cat([batch["pixel_values"]] * 2)
    assert counted(model, longer) > 2 * counted(model, batch)
