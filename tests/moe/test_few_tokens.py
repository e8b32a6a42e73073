# SPDX-License-Identifier: Apache-2.0
"""A decoding step: what a forward with gradients computes, by few operations, counted rather than timed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moellava.moe import MoESpec, counted_routing, router_losses, router_metrics, set_routing_context, upcycle
from moellava.moe.upcycle import moe_layers, sparse_mlp
from tests.moe.test_fused import Gated, GatedInOne, Plain

HIDDEN = 16
SPECS = {
    "k 2": {},
    "k 3 of 5": {"num_experts": [5], "top_k_experts": 3},
    "top 1": {"top_k_experts": 1},
    "top 1, probability": {"top_k_experts": 1, "top1_gate": "probability"},
    "granular": {"init": "granular", "granularity": 2, "num_experts": [8], "top_k_experts": 4},
    "bias": {"router_balance": "bias"},
    "residual": {"use_residual": True},
    "shared": {"init": "shared"},
    "room for all": {"drop_tokens": True, "eval_capacity_factor": 4.0},
    "room for few": {"drop_tokens": True, "eval_capacity_factor": 0.5, "min_capacity": 0},
}


def layer_of(mlp=Gated, dtype=torch.float32, **options):
    """A sparse layer whose experts and router differ."""
    torch.manual_seed(0)
    spec = MoESpec(**{"num_experts": [4], "top_k_experts": 2} | options)
    layer = sparse_mlp(mlp(HIDDEN, 24, True, nn.SiLU()), spec, spec.num_experts[0], 0).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        if layer.router.bias is not None:
            layer.router.bias += torch.randn(4)
        if spec.granularity > 1:  # slices of one MLP are chosen together
            layer.router.weight.copy_(layer.router.weight[::2].repeat_interleave(2, dim=0))
    for name, part in layer.named_children():
        if name != "router":
            part.to(dtype)
    return layer


class Operations(TorchDispatchMode):
    """Names of what is computed; views, which take no time to speak of, aside."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations(layer, tokens):
    x = torch.randn(tokens, 1, HIDDEN)
    with torch.no_grad():
        layer(x)  # which looks at what the experts are
        with Operations() as seen:
            layer(x)
    return seen.names


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("name", list(SPECS))
def test_a_step_is_what_a_forward_with_gradients_computes(name, tokens):
    layer, x = layer_of(**SPECS[name]), torch.randn(tokens, 1, HIDDEN)
    wanted = layer(x)
    assert layer.record is not None
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted, atol=1e-6, rtol=1e-5)
        assert layer.record is None
        with counted_routing_of(layer):
            torch.testing.assert_close(layer(x), wanted, atol=1e-6, rtol=1e-5)
    layer.router.weight.data.neg_()
    assert (layer(x) - wanted).abs().max() > 1e-2


def counted_routing_of(layer):
    return counted_routing(nn.ModuleList([layer]))


@pytest.mark.parametrize("mlp", [Gated, GatedInOne, Plain])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_whatever_the_experts_are_made_of(mlp, dtype, tokens):
    layer, x = layer_of(mlp, dtype), torch.randn(tokens, 1, HIDDEN).to(dtype)
    wanted, tolerance = layer(x), 1e-6 if dtype == torch.float32 else 3e-2
    with torch.no_grad():
        found = layer(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def test_experts_that_are_wrapped_or_watched_are_called():
    layer, x = layer_of(), torch.randn(3, 1, HIDDEN)
    called = []
    for expert in layer.experts:
        expert.down_proj.register_forward_hook(lambda module, args, out: called.append(1) or 2 * out)
    wanted = layer(x)
    called.clear()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted, atol=1e-6, rtol=1e-5)
    assert called


def test_equal_scores_go_to_the_same_experts_as_ever():
    layer, x = layer_of(), torch.randn(5, 1, HIDDEN)
    layer.router.weight.data.zero_()
    wanted = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted, atol=1e-6, rtol=1e-5)


def test_a_step_takes_few_operations_and_waits_for_nothing():
    """Router, sort and softmax; five for each chosen expert; what puts them together."""
    layer = layer_of()
    step = operations(layer, 1)
    assert len(step) <= 3 + 2 * 5 + 3, step
    assert step.count("sort") + step.count("topk") + step.count("argmax") == 1
    assert not {"item", "_local_scalar_dense", "nonzero", "bincount", "_to_copy", "scatter_"} & {*step}, step
    assert len(operations(layer, 8)) <= 3 + 4 * 5 + 10
    with counted_routing_of(layer):
        assert len(operations(layer, 1)) > 2 * len(step), "what is counted is what took the time"


def test_a_prompt_counts_nothing_either():
    layer = layer_of()
    prompt = operations(layer, 100)
    with counted_routing_of(layer):
        counted = operations(layer, 100)
    assert {"logsumexp", "xlogy"} <= {*counted} and not {"logsumexp", "xlogy"} & {*prompt}
    assert len(prompt) < len(counted) - 10


def test_statistics_are_for_those_who_ask(tiny_llava, batch):
    model = upcycle(tiny_llava(), MoESpec(moe_layers_idx=[2]))
    set_routing_context(model, batch["attention_mask"].bool(), batch["input_ids"] == 5)
    with torch.no_grad():
        logits = model(**batch).logits
        with pytest.raises(ValueError, match="counted_routing"):
            router_losses(model)
        assert router_metrics(model)["layer_2"]["tokens"] == 0
        with counted_routing(model):
            torch.testing.assert_close(model(**batch).logits, logits, atol=0, rtol=0)
            assert router_losses(model).aux > 0
        assert router_metrics(model)["layer_2"]["tokens"] == 19
        model(**batch)
    assert router_metrics(model)["layer_2"]["tokens"] == 0
    assert not moe_layers(copy.deepcopy(model))[0][1].context.counts_answers
