# SPDX-License-Identifier: Apache-2.0
"""Interventions: nothing is lost where experts are copies, what is said happens where they are not, all comes back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moellava.errors import UserError
from moellava.moe import MoESpec, moe_layers, upcycle
from moellava.moe.interventions import INTERVENTIONS, intervened
from moellava.moe.layer import NativeMoE
from moellava.moe.upcycle import sparse_mlp

COPIES = {
    "copy": {},
    "dropping": {"drop_tokens": True, "eval_capacity_factor": 4.0},
    "of then": {"second_expert": "sampled", "top1_gate": "probability", "router_balance": "first_choice"},
    "bias": {"router_balance": "bias"},
    "residual": {"use_residual": True},
    "shared": {"init": "shared"},
    "granular": {"init": "granular", "granularity": 2, "num_experts": [8], "top_k_experts": 4},
    "per layer": {"num_experts": [2, 4]},
}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize("recipe", list(COPIES))
def test_copies_lose_nothing_by_any_intervention(tiny_llava, batch, recipe):
    model = upcycle(tiny_llava(), MoESpec(moe_mode="sparse", **COPIES[recipe])).eval()
    whole = logits(model, batch)
    for name in INTERVENTIONS:
        with intervened(model, name):
            assert (logits(model, batch) - whole).abs().max() < 1e-6, name
    assert torch.equal(logits(model, batch), whole)


def parted(spec: MoESpec, n_experts: int = 4) -> NativeMoE:
    """A layer whose experts and routers have moved apart."""
    from tests.tiny import tiny_llava

    mlp = tiny_llava().get_decoder().layers[0].mlp
    layer = sparse_mlp(mlp, spec, n_experts, 0).eval()
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


def changed(layer: NativeMoE, name: str) -> NativeMoE:
    return INTERVENTIONS[name].change(layer, torch.Generator().manual_seed(0))


@torch.no_grad()
def test_each_does_what_it_says():
    layer = parted(MoESpec())
    x_TD = torch.randn(50, layer.hidden)
    each_ETD = torch.stack([expert(x_TD) for expert in layer.experts])
    close = lambda name, wanted: torch.testing.assert_close(changed(layer, name)(x_TD), wanted)  # noqa: E731
    close("one-expert", each_ETD[0])
    first_T = layer.router(x_TD).argmax(1)
    close("top-1", each_ETD[first_T, torch.arange(50)])
    mean = {
        n: sum(dict(e.named_parameters())[n] for e in layer.experts) / 4 for n, _ in layer.experts[0].named_parameters()
    }
    close("averaged", torch.func.functional_call(layer.experts[0], mean, x_TD))
    gate_NE = layer.router(x_TD).softmax(1)
    top_Nk = gate_NE.topk(2).indices
    gate_NE = gate_NE * F.one_hot(top_Nk, 4).sum(1)
    rows = changed(layer, "shuffled").router.weight
    partner = [next(i for i in range(4) if torch.equal(row, layer.router.weight[i])) for row in rows]
    assert sorted(partner) == [0, 1, 2, 3] and all(own != other for own, other in enumerate(partner))
    gate_NE = gate_NE[:, partner] / gate_NE.sum(1, keepdim=True)
    close("shuffled", (gate_NE.T[..., None] * each_ETD).sum(0))


@torch.no_grad()
def test_slices_stay_together():
    layer = parted(MoESpec(init="granular", granularity=2, num_experts=[8], top_k_experts=4), 8)
    rows = changed(layer, "shuffled").router.weight
    partner = [next(i for i in range(8) if torch.equal(row, layer.router.weight[i])) for row in rows]
    assert [one % 2 for one in partner] == [0, 1] * 4
    assert all(even // 2 == odd // 2 for even, odd in zip(partner[::2], partner[1::2], strict=True))
    x_TD = torch.randn(5, layer.hidden)
    both = (layer.experts[0](x_TD) + layer.experts[1](x_TD)) / 2
    torch.testing.assert_close(changed(layer, "one-expert")(x_TD), both)
    means = changed(layer, "averaged").experts
    torch.testing.assert_close(means[1].down_proj.weight, sum(e.down_proj.weight for e in layer.experts[1::2]) / 4)


def test_a_model_comes_back_after_a_failure(tiny_llava):
    model = upcycle(tiny_llava(), MoESpec(moe_mode="sparse"))
    before = moe_layers(model)
    with pytest.raises(KeyError), intervened(model, "averaged"):
        assert moe_layers(model) != before
        raise KeyError
    assert moe_layers(model) == before


def test_what_means_nothing_is_refused(tiny_llava):
    with pytest.raises(UserError, match="this model is dense"), intervened(tiny_llava(), "shuffled"):
        pass
    single = upcycle(tiny_llava(), MoESpec(top_k_experts=1))
    with pytest.raises(UserError, match="visit one expert anyway"), intervened(single, "top-1"):
        pass
    lone = upcycle(tiny_llava(), MoESpec(num_experts=[1], top_k_experts=1))
    with pytest.raises(UserError, match="one expert alone"), intervened(lone, "shuffled"):
        pass
