# SPDX-License-Identifier: Apache-2.0
"""A sparse layer, a decoder layer with one, and the loss are one graph each for torch.compile, and say what they say
without."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moellava.moe import MoESpec, moe_layers, router_losses, router_metrics, set_routing_context, upcycle
from moellava.train.loss import SupervisedHead, supervised_positions
from tests.tiny import tiny_llava

OPTIONS = [{}, {"capacity_factor": 1.0}, {"use_residual": True, "router_balance": "bias"}]


@pytest.fixture
def compiled():
    """Compiles a function in one graph, or fails."""
    torch._dynamo.reset()
    yield lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


def learnt(run, model, x):
    """What a part gives, and the gradients of its input and of the model, with the routers' losses."""
    x = x.clone().requires_grad_()
    out = run(x)
    losses = router_losses(model)
    ((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + losses.total).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, "total": losses.total.detach()} | grads, router_metrics(model)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("part", ["MoE layer", "decoder layer"])
def test_a_layer_is_one_graph(part, options, compiled):
    model = upcycle(tiny_llava(hidden_size=32, intermediate_size=64), MoESpec(moe_layers_idx=[1], **options)).train()
    mask, x = torch.ones(2, 16, dtype=torch.bool), torch.randn(2, 16, 32)
    mask[1, 9:] = False
    real = mask.flatten().nonzero().flatten()

    def found(model: nn.Module, compile_it: bool):
        layer, decoder = moe_layers(model)[0][1], model.get_decoder()
        run = layer
        if part == "decoder layer":
            place = torch.arange(16).unsqueeze(0)
            given = {"position_embeddings": decoder.rotary_emb(x, place), "position_ids": place}
            run = lambda hidden: decoder.layers[1](hidden, **given)  # noqa: E731
        set_routing_context(model, mask, places=real)
        return learnt(compiled(run) if compile_it else run, model, x)

    (wanted, load), (values, counted) = found(copy.deepcopy(model), False), found(model, True)
    torch.testing.assert_close(values, wanted, atol=2e-6, rtol=1e-4)
    assert any("experts.3" in name for name in values) and counted["layer_1"]["load"] == load["layer_1"]["load"]
    assert counted["layer_1"]["tokens"] == 25


@pytest.mark.slow
def test_sizes_that_grouped_kernels_do_not_take_are_one_graph_too(compiled):
    model = upcycle(tiny_llava(hidden_size=32, intermediate_size=62), MoESpec(moe_layers_idx=[1])).train()
    x, layer = torch.randn(2, 16, 32), moe_layers(model)[0][1]
    wanted, _ = learnt(layer, model, x)
    model.zero_grad()
    values, _ = learnt(compiled(layer), model, x)
    torch.testing.assert_close(values, wanted, atol=2e-6, rtol=1e-4)


@pytest.mark.slow
def test_a_layer_that_answers_is_one_graph(compiled):
    model = upcycle(tiny_llava(hidden_size=32, intermediate_size=64), MoESpec(moe_layers_idx=[1])).eval()
    layer = moe_layers(model)[0][1]
    with torch.no_grad():
        x = torch.randn(1, 3, 32)
        torch.testing.assert_close(compiled(layer)(x), layer(x), atol=2e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["one piece", "chunks"])
def test_the_loss_is_one_graph(rows, compiled, monkeypatch):
    monkeypatch.setattr("moellava.train.loss.CHUNK", 2**25 if rows == "one piece" else 96 * 5)
    model, labels = tiny_llava(hidden_size=32), torch.randint(6, 96, (2, 16))
    head, supervised = SupervisedHead(model.lm_head, 96), supervised_positions(labels)
    head.is_last = True

    def loss(hidden):
        with head.only(supervised):
            logits = model.lm_head(hidden)
        return head.loss_sum(logits, supervised.target_N)

    found = []
    for run in (loss, compiled(loss)):
        model.zero_grad()
        hidden = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        value = run(hidden)
        value.backward()
        found.append([value.detach(), hidden.grad, model.lm_head.weight.grad.clone()])
    torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=1e-5)
