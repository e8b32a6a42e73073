# SPDX-License-Identifier: Apache-2.0
"""Experts with adapters and in 4 bits as grouped products, against calling each: the path of a GPU, on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from moellava.adapters.lora import lora_layers
from moellava.adapters.quantize import quantise
from moellava.moe.adapted import adapted_of
from moellava.moe.experts import Dispatch, loop_over_experts, run_experts
from moellava.moe.grouped import run_adapted
from moellava.moe.places import in_place, lie_together
from tests.moe.test_fused import Gated, GatedInOne, Plain, problem

LINEARS = {
    Gated: ["gate_proj", "up_proj", "down_proj"],
    GatedInOne: ["gate_up_proj", "down_proj"],
    Plain: ["fc1", "fc2"],
}


def adapted(mlp, bias=True, targets=None, four_bits=False, **options):
    """The experts of `problem` with adapters that have learnt something; their weights are frozen."""
    experts, x, dispatch = problem(mlp, bias, width=32)
    model = nn.ModuleList(experts)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if four_bits:
        names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
        quantise(model, names, torch.device("cpu"), bits=4, quant_type="nf4", double_quant=True)
    config = {"r": 3, "lora_alpha": 7, "target_modules": targets or LINEARS[mlp], **options}
    inject_adapter_in_model(LoraConfig(**config), model)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    return list(model), x, dispatch


def grouped(experts, x, dispatch):
    found = adapted_of(experts)
    assert found is not None
    return run_adapted(x, dispatch.gate_R, dispatch.token_R, dispatch.count_E, found)


def learnt(run, experts, x, dispatch):
    """The result, and the gradients of tokens, gates and of all that trains, by name."""
    x, gate = x.clone().requires_grad_(), dispatch.gate_R.clone().requires_grad_()
    trained = {name: p for name, p in nn.ModuleList(experts).named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.grad = None
    out = run(experts, x, Dispatch(dispatch.token_R, gate, dispatch.count_E))
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    idle = lambda p: torch.zeros_like(p) if p.grad is None else p.grad.clone()  # noqa: E731
    return {"": out.detach(), "x": x.grad, "gate": gate.grad} | {name: idle(p) for name, p in trained.items()}


@pytest.mark.parametrize("mlp", [Gated, GatedInOne, Plain])
@pytest.mark.parametrize("bias", [True, False])
def test_adapters_in_grouped_products_equal_calling_each_expert(mlp, bias):
    case = adapted(mlp, bias)
    wanted, found = learnt(loop_over_experts, *case), learnt(grouped, *case)
    assert sum(".lora_" in name for name in found) == 4 * 2 * len(LINEARS[mlp])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("double", ["adapters alone", "not of all linears"])
def test_four_bits_are_dequantised_and_not_kept(double):
    case = adapted(Gated, four_bits=True, targets=["down_proj"] if double == "not of all linears" else None)
    wanted, found = learnt(loop_over_experts, *case), learnt(grouped, *case)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        grouped(*case)
    assert 4 * 16 * 32 not in kept, "the weights of four experts"


def test_the_step_of_a_gpu_takes_them(monkeypatch):
    """Without a call of any expert, and under autocast too."""
    case = adapted(Gated)
    wanted = learnt(loop_over_experts, *case)
    monkeypatch.setattr("moellava.moe.experts.can_group", lambda *_: True)
    monkeypatch.setattr("moellava.moe.experts.loop_over_experts", None)
    torch.testing.assert_close(learnt(run_experts, *case), wanted, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = learnt(run_experts, *case)
    assert all(value.dtype == torch.float32 for value in half.values())
    torch.testing.assert_close(half[""], wanted[""], atol=0.1, rtol=0.1)
    assert float((half[""] - wanted[""]).abs().max()) > 1e-5, "the products ran in fp32"


def test_dropout_drops_of_the_adapters_input_in_training_alone():
    """Half of it: the mean over many draws is what comes without, and one draw is not."""
    experts, x, dispatch = adapted(Plain, targets=["fc2"], lora_dropout=0.5)
    whole = grouped(list(nn.ModuleList(experts).eval()), x, dispatch).detach()
    nn.ModuleList(experts).train()
    with torch.no_grad():
        draws = torch.stack([grouped(experts, x, dispatch) for _ in range(400)])
    assert float((draws[0] - whole).abs().max()) > 1e-2
    assert float((draws.mean(0) - whole).abs().max()) < 5 * float(draws.std(0).max()) / 400**0.5


def test_adapters_that_are_off_or_merged_are_left_out():
    experts, x, dispatch = adapted(Gated)
    with_adapters = grouped(experts, x, dispatch).detach()
    off = copy.deepcopy(experts)
    for _, layer in lora_layers(nn.ModuleList(off)):
        layer.enable_adapters(False)
    torch.testing.assert_close(grouped(off, x, dispatch), loop_over_experts(off, x, dispatch), atol=1e-5, rtol=1e-5)
    assert float((grouped(off, x, dispatch) - with_adapters).detach().abs().max()) > 1e-2
    for _, layer in lora_layers(nn.ModuleList(experts)):
        layer.merge()
    torch.testing.assert_close(grouped(experts, x, dispatch), with_adapters, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_what_does_more_is_called(options):
    assert adapted_of(adapted(Gated, **options)[0]) is None


def test_other_ranks_and_watched_linears_are_called():
    experts, _, _ = adapted(Gated)
    assert adapted_of(experts) is not None
    assert adapted_of([*experts[:3], adapted(Gated, r=2)[0][0]]) is None
    experts[3].up_proj.lora_A["default"].register_forward_hook(lambda *_: None)
    assert adapted_of(experts) is None


def test_an_mlp_with_more_than_its_linears_is_called():
    class Halved(Gated):
        def forward(self, x):
            return super().forward(x) / 2

    LINEARS[Halved] = LINEARS[Gated]
    assert adapted_of(adapted(Halved)[0]) is None


def test_adapters_are_read_where_they_lie():
    case = adapted(Gated)
    wanted = learnt(grouped, *case)
    lie_together(case[0])
    downs = [expert.up_proj.lora_A["default"].weight for expert in case[0]]
    assert in_place(downs) is not None
    assert in_place([expert.up_proj.base_layer.weight for expert in case[0]]) is not None
    torch.testing.assert_close(learnt(grouped, *case), wanted, atol=2e-6, rtol=1e-5)
