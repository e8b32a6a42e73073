# SPDX-License-Identifier: Apache-2.0
"""The DeepSpeed engine: equal to the native one in one process, and over real processes under the launcher."""

from __future__ import annotations

import pytest
import torch

from moellava.errors import UserError
from moellava.moe import (
    MoESpec,
    convert_engine,
    expert_parameters,
    gather_moe_state_dict,
    moe_layers,
    native_names,
    router_losses,
    set_routing_context,
    spread_shapes,
    upcycle,
)

RECIPES = {
    "copy": {"num_experts": [2, 4]},
    "residual": {"use_residual": True},
    "shared": {"init": "shared"},
    "three": {"top_k_experts": 3},
    "one": {"top_k_experts": 1},
    "full experts": {"drop_tokens": True, "capacity_factor": 0.6},
}


def perturb(model):
    """Makes experts differ, so that a token in the wrong place shows."""
    generator = torch.Generator().manual_seed(7)
    for parameter in expert_parameters(model):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_one_process_equals_the_native_engine_without_any_process_group(tiny_llava, batch, recipe):
    """No process group exists here, so a collective would fail."""
    spec = MoESpec(moe_mode="sparse", router_z_loss_coef=0.1, **RECIPES[recipe])
    results = []
    for engine in ("native", "deepspeed"):
        model = perturb(upcycle(tiny_llava(), spec)).train()
        convert_engine(model, engine)
        set_routing_context(model, batch["attention_mask"].bool())
        out = model(**batch).logits
        (out.logsumexp(-1).mean() + router_losses(model).total).backward()
        convert_engine(model, "native")
        results.append((out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(*(result[0] for result in results), atol=1e-5, rtol=1e-5)
    assert set(results[0][1]) == set(results[1][1])
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, atol=1e-5, rtol=1e-5, msg=name)


def test_it_is_deepspeeds_layer_and_its_experts_are_marked(tiny_llava):
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer

    model = upcycle(tiny_llava(), MoESpec(moe_mode="sparse", use_residual=True), engine="deepspeed")
    layers = [layer for _, layer in moe_layers(model)]
    assert all(isinstance(layer, MoE) for layer in layers)
    marked = {id(p) for p in model.parameters() if is_moe_param(p)}
    experts = {id(p) for layer in layers for e in layer.local_experts().values() for p in e.parameters()}
    assert marked == experts  # the residual MLP is the same on every rank: averaged as any dense parameter
    groups = split_params_into_different_moe_groups_for_optimizer(
        [{"name": "decay", "params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1}]
    )
    assert [group["name"] for group in groups if group.get("moe")] == ["ep_size_1"]


def test_state_dict_has_native_names(tiny_llava):
    native = perturb(upcycle(tiny_llava(), MoESpec(moe_mode="sparse", router_balance="bias")))
    expected = {name: value.clone() for name, value in native.state_dict().items()}
    model = convert_engine(native, "deepspeed")
    state = gather_moe_state_dict(model)
    assert set(state) == set(expected) and all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("rank", range(4))
def test_a_rank_holds_its_share_under_global_indices(tiny_llava, monkeypatch, rank):
    """Four processes with two sets of four experts: ranks 1 and 3 hold the last two experts of a layer."""
    monkeypatch.setattr("moellava.moe.deepspeed.rank", lambda: rank)
    monkeypatch.setattr("moellava.moe.deepspeed.world_size", lambda: 4)
    native = perturb(upcycle(tiny_llava(), MoESpec(moe_mode="sparse")))
    expected = {name: value.clone() for name, value in native.state_dict().items()}
    model = convert_engine(native, "deepspeed", ep_size=2)
    assert [list(layer.local_experts()) for _, layer in moe_layers(model)] == [[0, 1] if rank % 2 == 0 else [2, 3]] * 2
    state, names = model.state_dict(), native_names(model)
    assert len(names) == 2 * 2 * 3, "layers, experts and linears"
    assert all(torch.equal(state[own], expected[name]) for own, name in names.items())
    experts = {name: value.shape for name, value in expected.items() if ".experts." in name}
    assert {name: value.shape for name, value in spread_shapes(model).items()} == experts


def test_sizes_that_do_not_divide(tiny_llava):
    with pytest.raises(UserError, match="--ep_size 3 does not divide --num_experts 4"):
        upcycle(tiny_llava(), MoESpec(), engine="deepspeed", ep_size=3)
    with pytest.raises(UserError, match="--ep_size 2 does not divide the 1 processes"):
        upcycle(tiny_llava(), MoESpec(), engine="deepspeed", ep_size=2)


MODEL = """
import os
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from transformers import LlamaConfig, LlamaForCausalLM
from moellava.moe import *

def build(spec, ep_size=None):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=96)
    model = upcycle(LlamaForCausalLM(LlamaConfig(**sizes)), spec).train()
    generator = torch.Generator().manual_seed(7)
    for parameter in expert_parameters(model):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return convert_engine(model, "deepspeed", ep_size) if ep_size else model

def batch(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(0, 96, (1, 9 if rank == 0 else 23), generator=generator)

def loss_of(forward, model, ids):
    set_routing_context(model, torch.ones_like(ids, dtype=torch.bool))
    logits = forward(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]) + router_losses(model).total

def initialize(model, stage):
    flat = [p for p in model.parameters() if p.dim() == 1], [p for p in model.parameters() if p.dim() > 1]
    groups = [{"name": n, "params": g} for n, g in zip(("no_decay", "decay"), flat)]
    groups = split_params_into_different_moe_groups_for_optimizer(groups)
    optimizer = torch.optim.SGD(groups, lr=0.2, momentum=0.9)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    config |= {"zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}  # its default is 1.0
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
"""

TRAIN = (
    MODEL
    + """
SPEC = MoESpec(moe_mode="sparse", num_experts=[2, 4], router_z_loss_coef=0.01)
results = {}
reference = build(SPEC)
optimizer = torch.optim.SGD(reference.parameters(), lr=0.2, momentum=0.9)
results["native"] = []
for step in range(3):
    losses = [loss_of(reference, reference, batch(step, r)) for r in range(world)]
    optimizer.zero_grad()
    (sum(losses) / world).backward()
    optimizer.step()
    results["native"].append(float(sum(losses) / world))
expected = reference.state_dict()

for stage, ep_size, checkpointing in ((0, 1, 0), (0, 2, 1), (1, 2, 0), (2, 1, 1), (2, 2, 1)):
    model = build(SPEC, ep_size)
    if checkpointing:
        enable_gradient_checkpointing(model)
    engine = initialize(model, stage)
    losses = []
    for step in range(3):
        loss = loss_of(engine, model, batch(step, rank))
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(float(total / world))
    state = gather_moe_state_dict(model)
    worst = max((float((state[n] - expected[n]).abs().max()) for n in state), default=None)
    results[f"{stage} {ep_size}"] = {"losses": losses, "worst": worst, "missing": sorted(set(expected) - set(state))}
report(results)
"""
)


@pytest.mark.slow
def test_two_processes_train_as_one_does(launch):
    """ZeRO-0, 1, 2 × ep_size 1, 2, ranks of unequal lengths, with and without gradient checkpointing."""
    first, second = launch(TRAIN, 2)
    for key, run in first.items():
        if key == "native":
            continue
        assert run["losses"] == pytest.approx(first["native"], abs=2e-5), key
        assert run["worst"] < 2e-5, key
        assert run["missing"] == [] and second[key]["worst"] is None


GENERATE = (
    MODEL
    + """
model = build(MoESpec(), 2)
engine = initialize(model, 2)
model.eval()
set_routing_context(model)
prompts = [batch(0, r) for r in range(world)]
limits = dict(do_sample=False, pad_token_id=0)
news = [2, 5]
spread = model.generate(prompts[rank], max_new_tokens=news[rank], **limits, synced_gpus=True)
whole = convert_engine(model, "native")
alone = whole.generate(prompts[rank], max_new_tokens=news[rank], **limits)
report({"equal": torch.equal(spread, alone), "length": spread.shape[1]})
"""
)


@pytest.mark.slow
def test_ranks_generate_different_lengths_at_ep_size_two(launch):
    results = launch(GENERATE, 2)
    assert [result["equal"] for result in results] == [True, True]
    assert [result["length"] for result in results] == [9 + 2, 23 + 5]
