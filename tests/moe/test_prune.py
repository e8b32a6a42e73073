# SPDX-License-Identifier: Apache-2.0
"""Pruning: what experts carry is what one adds up by hand; copies lose nothing; merging is a weighed mean."""

from __future__ import annotations

import pytest
import torch

from moellava.errors import UserError
from moellava.moe import MoESpec, moe_layers, upcycle
from moellava.moe.prune import carried, prune


def sparse(tiny_llava, **options):
    model = upcycle(tiny_llava(), MoESpec(moe_mode="sparse", **options)).eval()
    torch.manual_seed(0)
    for _, layer in moe_layers(model):
        size = layer.spec.granularity
        rows = torch.randn(layer.n_experts // size, layer.hidden)
        layer.router.weight.data = rows.repeat_interleave(size, 0)  # the slices of a set stay together
    return model


def apart(model):
    for _, layer in moe_layers(model):
        for parameter in layer.experts.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


@torch.no_grad()
def test_what_experts_carry_is_gate_times_norm_of_real_tokens(tiny_llava, batch):
    model = apart(sparse(tiny_llava))
    (index, layer), *_ = moe_layers(model)
    seen = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    whole = logits(model, batch)
    hook.remove()
    x_TD = seen[0][batch["attention_mask"].bool()]
    prob_TE = layer.router(x_TD).softmax(1)
    gate_Tk, expert_Tk = prob_TE.topk(2)
    gate_Tk = gate_Tk / gate_Tk.sum(1, keepdim=True)
    wanted = torch.zeros(4)
    for expert in range(4):
        norm_T = layer.experts[expert](x_TD).norm(dim=1)
        wanted[expert] = (gate_Tk * (expert_Tk == expert)).sum(1) @ norm_T
    found = carried(model, [batch, batch])
    torch.testing.assert_close(found[index].float(), 2 * wanted, rtol=1e-4, atol=1e-5)
    assert list(found) == [one for one, _ in moe_layers(model)]
    assert torch.equal(logits(model, batch), whole), "measuring has changed the model"


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_residual": True},
        {"router_balance": "bias"},
        {"init": "granular", "granularity": 2, "num_experts": [8], "top_k_experts": 4},
    ],
    ids=str,
)
def test_copies_lose_nothing(tiny_llava, batch, options, merge):
    model = sparse(tiny_llava, **options)
    whole, size = logits(model, batch), options.get("granularity", 1)
    spec, kept = prune(model, carried(model, [batch]), 2 * size, merge)
    assert (logits(model, batch) - whole).abs().max() < 1e-6
    assert spec.num_experts == [2 * size] * 2 and all(len(one.experts) == 2 * size for one in kept.values())
    assert all(layer.n_experts == 2 * size and layer.spec is spec for _, layer in moe_layers(model))


def test_those_that_carry_most_stay_and_the_others_are_merged_or_lost(tiny_llava):
    carries = {index: torch.tensor([1.0, 5.0, 3.0, 1.0], dtype=torch.float64) for index in (0, 2)}
    for merge in (False, True):
        model = apart(sparse(tiny_llava))
        layer = moe_layers(model)[0][1]
        layer.router.weight.data = torch.eye(4, layer.hidden)
        layer.router.weight.data[0] = layer.router.weight.data[1]  # likest to expert 1
        layer.router.weight.data[3] = layer.router.weight.data[2] * 2 + 0.1 * layer.router.weight.data[1]
        before = [expert.down_proj.weight.clone() for expert in layer.experts]
        _, kept = prune(model, carries, 2, merge)
        assert kept[0].experts == [1, 2] and kept[0].share == pytest.approx(0.8)
        first, second = (expert.down_proj.weight for expert in moe_layers(model)[0][1].experts)
        wanted = (before[0] + 5 * before[1]) / 6 if merge else before[1]
        torch.testing.assert_close(first, wanted)
        torch.testing.assert_close(second, (3 * before[2] + before[3]) / 4 if merge else before[2])
        assert "keeps 1, 2 of 4 experts, which carried 80.0 %" in kept[0].line(0)


def test_too_few_are_refused(tiny_llava, batch):
    model = sparse(tiny_llava)
    with pytest.raises(UserError, match="each token visits 2 experts"):
        prune(model, carried(model, [batch]), 1)
    model = sparse(tiny_llava, init="granular", granularity=2, num_experts=[8], top_k_experts=4)
    with pytest.raises(UserError, match="whole sets of 2 slices"):
        prune(model, carried(model, [batch]), 5)
