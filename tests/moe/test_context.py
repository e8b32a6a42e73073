# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing: the router learns, decisions are replayed, nothing is counted twice."""

from __future__ import annotations

import pytest
import torch

from moellava.moe import (
    MoESpec,
    enable_gradient_checkpointing,
    moe_layers,
    router_losses,
    router_metrics,
    router_parameters,
    set_routing_context,
    upcycle,
)


def train_step(model, batch):
    set_routing_context(model, batch["attention_mask"].bool(), batch["input_ids"] == 5)
    loss = model(**batch, use_cache=False).logits.logsumexp(-1).mean() + router_losses(model).total
    loss.backward()
    return loss


def test_same_loss_and_gradients_as_without(tiny_llava, batch):
    spec = MoESpec(moe_mode="dense", router_z_loss_coef=0.1, use_residual=True)
    results = []
    for checkpointed in (False, True):
        model = upcycle(tiny_llava(), spec).train()
        if checkpointed:
            enable_gradient_checkpointing(model)
        loss = train_step(model, batch)
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}, router_metrics(model)))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        if grad is not None:
            torch.testing.assert_close(results[1][1][name], grad, msg=name)
    assert results[0][2] == results[1][2]


def test_the_router_learns_under_checkpointing(tiny_llava, batch):
    model = upcycle(tiny_llava(), MoESpec(moe_mode="dense", router_aux_loss_coef=0.0)).train()
    torch.nn.init.normal_(moe_layers(model)[1][1].experts[0].down_proj.weight)  # else all experts agree
    enable_gradient_checkpointing(model)
    train_step(model, batch)
    assert router_parameters(model)[1].grad.abs().max() > 1e-6


@pytest.mark.parametrize("values", [{"second_expert": "sampled"}, {"router_jitter": 0.5}])
def test_routing_is_not_redone(tiny_llava, batch, values, monkeypatch):
    """Even if the recomputed forward would draw other numbers, tokens stay where they went."""
    model = upcycle(tiny_llava(), MoESpec(moe_mode="dense", **values)).train()
    enable_gradient_checkpointing(model)
    seen = []
    layer = moe_layers(model)[0][1]
    run = layer.run
    monkeypatch.setattr(layer, "run", lambda x, routing: (seen.append(routing.choice.expert_Nk), run(x, routing))[1])
    calls = []
    select = type(layer)._select
    monkeypatch.setattr(type(layer), "_select", lambda self, *a: (calls.append(self), select(self, *a))[1])
    train_step(model, batch)
    assert len(seen) == 2 and torch.equal(*seen)
    assert len(calls) == 4  # once per layer


def test_two_forwards_before_their_backwards(tiny_llava, batch):
    """Each recomputation replays its own forward, although the context has moved on."""
    results = []
    for checkpointed in (False, True):
        model = upcycle(tiny_llava(), MoESpec(moe_mode="dense")).train()
        if checkpointed:
            enable_gradient_checkpointing(model)
        losses = []
        for length in (11, 9):
            part = {k: v[:, :length] if v.dim() == 2 else v for k, v in batch.items()}
            set_routing_context(model, part["attention_mask"].bool())
            losses.append(model(**part, use_cache=False).logits.logsumexp(-1).mean() + router_losses(model).total)
        for loss in losses:
            loss.backward()
        results.append([p.grad for p in router_parameters(model)])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_a_dense_model_checkpoints_too(tiny_llava, batch):
    model = tiny_llava().train()
    enable_gradient_checkpointing(model)
    model(**batch, use_cache=False).logits.mean().backward()
    assert model.get_decoder().layers[0].mlp.up_proj.weight.grad.any()
