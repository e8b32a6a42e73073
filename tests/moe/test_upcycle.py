# SPDX-License-Identifier: Apache-2.0
"""Conversion: exact where it says so, for every decoder; and what routers see and report."""

from __future__ import annotations

import pytest
import torch

from moellava.errors import UserError
from moellava.moe import (
    MoESpec,
    convert_engine,
    counted_routing,
    expert_parameters,
    moe_layers,
    router_losses,
    router_metrics,
    router_parameters,
    separate_experts,
    set_routing_context,
    upcycle,
    update_router_bias,
)

FAMILIES = ["llama", "mistral", "phi", "phi3", "qwen2", "stablelm"]
EXACT = {
    "copy": {},
    "one choice": {"top_k_experts": 1},
    "three choices": {"top_k_experts": 3},
    "per layer": {"num_experts": [2, 4]},
    "residual": {"use_residual": True},
    "shared": {"init": "shared"},
    "granular": {"init": "granular", "granularity": 2, "num_experts": [8], "top_k_experts": 4},
    "no noise": {"init": "noise", "init_noise": 0.0},
}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", list(EXACT))
def test_exact_recipes_keep_the_logits(tiny_llava, batch, family, recipe):
    model = tiny_llava(family)
    spec = MoESpec(moe_mode="sparse", **EXACT[recipe])
    dense = logits(model, batch)
    upcycle(model, spec)
    assert spec.is_exact() and len(moe_layers(model)) == 2
    assert (logits(model, batch) - dense).abs().max() < 1e-6


@pytest.mark.parametrize("values", [{"init": "noise", "init_noise": 0.2}, {"init": "drop", "init_drop_ratio": 0.5}])
def test_other_recipes_do_not_and_say_so(tiny_llava, batch, values):
    model = tiny_llava()
    spec = MoESpec(moe_mode="sparse", **values)
    dense = logits(model, batch)
    upcycle(model, spec)
    assert not spec.is_exact()
    assert (logits(model, batch) - dense).abs().max() > 1e-4
    first, second = list(moe_layers(model)[0][1].experts)[:2]
    assert not torch.equal(first.down_proj.weight, second.down_proj.weight)


def test_drop_redraws_the_same_units_in_every_matrix(tiny_llava):
    model = tiny_llava()
    dense = [p.clone() for p in model.get_decoder().layers[0].mlp.parameters()]
    upcycle(model, MoESpec(moe_mode="sparse", init="drop", init_drop_ratio=0.25))
    gate, up, down = (e != d for e, d in zip(moe_layers(model)[0][1].experts[1].parameters(), dense, strict=True))
    units = gate.any(1)
    assert units.sum() == 12
    assert torch.equal(units, up.any(1)) and torch.equal(units, down.any(0))


def test_the_same_seed_gives_the_same_model(tiny_llava):
    spec = MoESpec(init="drop", init_seed=3)
    first, second = (upcycle(tiny_llava(), spec).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = upcycle(tiny_llava(), MoESpec(init="drop", init_seed=4)).state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_names_and_shapes_of_a_sparse_layer(tiny_llava):
    model = upcycle(tiny_llava(), MoESpec(moe_layers_idx=[1], use_residual=True))
    prefix = "model.language_model.layers.1.mlp."
    names = {n.removeprefix(prefix): tuple(t.shape) for n, t in model.state_dict().items() if n.startswith(prefix)}
    assert names["router.weight"] == (4, 32)
    assert names["experts.3.down_proj.weight"] == names["shared.down_proj.weight"] == (32, 48)
    assert names["coefficient.weight"] == (2, 32) and len(names) == 1 + 4 * 3 + 3 + 2


def test_uninitialised_conversion_takes_a_state_dict(tiny_llava, batch):
    spec = MoESpec(init="granular", granularity=2, num_experts=[4], router_balance="bias")
    model = upcycle(tiny_llava(), spec)
    with torch.device("meta"):
        shell = type(model)(model.config)
    upcycle(shell, spec, initialize=False)
    shell.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert set(shell.state_dict()) == set(model.state_dict())


def test_what_cannot_be_upcycled_says_why(tiny_llava):
    model = upcycle(tiny_llava(), MoESpec())
    with pytest.raises(UserError, match="sparse already"):
        upcycle(model, MoESpec())
    odd = tiny_llava()
    odd.get_decoder().layers[3].mlp = torch.nn.Linear(32, 32)
    with pytest.raises(UserError, match=r"mlp \(Linear\).* none is a plain MLP"):
        upcycle(odd, MoESpec())
    with pytest.raises(UserError, match="ep_size 2"):
        upcycle(tiny_llava(), MoESpec(), ep_size=2)


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("recipe", list(EXACT))
def test_every_expert_and_router_gets_a_gradient(tiny_llava, batch, family, recipe):
    model = upcycle(tiny_llava(family), MoESpec(moe_mode="sparse", router_z_loss_coef=0.1, **EXACT[recipe])).train()
    set_routing_context(model, batch["attention_mask"].bool())
    out = model(**batch).logits.logsumexp(-1).mean()
    (out + router_losses(model).total).backward()
    assert all(p.grad is not None for p in expert_parameters(model))
    assert all(p.grad is not None and p.grad.any() for p in router_parameters(model) if p.dim() == 2)


def test_a_batch_of_padding_alone_still_touches_everything(tiny_llava, batch):
    model = upcycle(tiny_llava(), MoESpec(moe_mode="sparse")).train()
    set_routing_context(model, torch.zeros_like(batch["input_ids"], dtype=torch.bool))
    (model(**batch).logits.mean() + router_losses(model).total).backward()
    assert all(p.grad is not None for p in [*expert_parameters(model), *router_parameters(model)])


def test_padding_changes_neither_losses_nor_counts(tiny_llava, batch):
    model = upcycle(tiny_llava(), MoESpec(moe_mode="dense"))
    results = []
    for extra in (0, 5):
        padded = {k: torch.nn.functional.pad(v, (0, extra)) if v.dim() == 2 else v for k, v in batch.items()}
        set_routing_context(model, padded["attention_mask"].bool(), padded["input_ids"] == 5)
        with torch.no_grad(), counted_routing(model):
            kept = model(**padded).logits[padded["attention_mask"].bool()]
        losses = router_losses(model)
        results.append((kept, losses.aux, losses.z, router_metrics(model)))
    for first, second in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)
    assert results[0][3]["layer_0"]["load"] == results[1][3]["layer_0"]["load"]
    assert results[0][3]["layer_0"]["tokens"] == 19


def test_metrics_split_image_and_text_and_reset(tiny_llava, batch):
    model = upcycle(tiny_llava(), MoESpec(moe_layers_idx=[2], num_experts=[3]))
    set_routing_context(model, batch["attention_mask"].bool(), batch["input_ids"] == 5)
    with counted_routing(model):
        logits(model, batch)
    found = router_metrics(model)["layer_2"]
    assert found["tokens"] == 19
    mixed = [8 / 19 * i + 11 / 19 * t for i, t in zip(found["load_image"], found["load_text"], strict=True)]
    assert mixed == pytest.approx(found["load"])
    assert sum(found["load"]) == pytest.approx(1) and found["dropped"] == 0
    assert 0 < found["entropy"] < 1.0987
    assert router_metrics(model)["layer_2"]["tokens"] == 0


def test_dead_experts_are_named(tiny_llava, batch):
    model = upcycle(tiny_llava(), MoESpec(moe_layers_idx=[2]))
    layer = moe_layers(model)[0][1]
    layer.router.weight.data.zero_()  # all logits equal: ties go to experts 0 and 1
    with counted_routing(model):
        logits(model, batch)
    assert router_metrics(model)["layer_2"]["dead"] == [2, 3]


def test_a_stale_context_is_refused(tiny_llava, batch):
    model = upcycle(tiny_llava(), MoESpec())
    set_routing_context(model, torch.ones(2, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="set_routing_context"):
        logits(model, batch)
    set_routing_context(model)
    logits(model, batch)


def test_bias_balancing_evens_out_the_load(tiny_llava, batch):
    """The bias alone, no gradient: the load of a fixed batch becomes more even."""
    spec = MoESpec(moe_layers_idx=[0], router_balance="bias", router_bias_rate=0.004, top_k_experts=1)
    model = upcycle(tiny_llava(), spec).train()
    spread = []
    for _ in range(60):
        set_routing_context(model)
        logits(model, batch)
        update_router_bias(model)
        load = router_metrics(model)["layer_0"]["load"]
        spread.append(max(load) - min(load))
    assert sum(spread[-10:]) / 10 < 0.7 * spread[0]
    assert "model.language_model.layers.0.mlp.router.bias" in model.state_dict()


def test_a_frozen_router_keeps_its_values(tiny_llava, batch):
    model = upcycle(tiny_llava(), MoESpec(freeze_router=True)).train()
    assert not any(p.requires_grad for p in router_parameters(model))
    (model(**batch).logits.logsumexp(-1).mean() + router_losses(model).total).backward()
    assert all(p.grad is None for p in router_parameters(model))
    assert all(p.grad is not None for p in expert_parameters(model))


def test_dropping_leaves_tokens_out(tiny_llava, batch):
    spec = MoESpec(moe_layers_idx=[0], drop_tokens=True, eval_capacity_factor=0.5)
    model = upcycle(tiny_llava(), spec)
    set_routing_context(model)
    with counted_routing(model):
        logits(model, batch)
    assert 0.3 < router_metrics(model)["layer_0"]["dropped"] <= 0.6


def test_generation_runs_token_by_token(tiny_llava, batch):
    model = tiny_llava()
    ids = batch["input_ids"][:1, 6:]
    dense = model.generate(ids, max_new_tokens=6, do_sample=False)
    upcycle(model, MoESpec())
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), dense)


def memory_of(model) -> int:
    """Bytes of a model's parameters, those of one place counted once."""
    return sum({parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}.values())


def test_a_process_takes_memory_for_its_own_experts_alone(tiny_llava, monkeypatch):
    monkeypatch.setattr("moellava.moe.deepspeed.rank", lambda: 3)
    monkeypatch.setattr("moellava.moe.deepspeed.world_size", lambda: 4)
    spec, dense = MoESpec(moe_mode="sparse", num_experts=[8]), memory_of(tiny_llava())
    whole, model = upcycle(tiny_llava(), spec), upcycle(tiny_llava(), spec, share_copies=True)
    routers = sum(parameter.nbytes for parameter in router_parameters(model))
    assert memory_of(model) == dense + routers
    one = memory_of(whole) - dense - routers  # seven more experts in each sparse layer
    convert_engine(model, "deepspeed", ep_size=4)
    separate_experts(model)
    assert memory_of(model) == dense + routers + one // 7
    kept = {index for _, layer in moe_layers(model) for index in layer.local_experts()}
    assert kept == {6, 7}
    first, second = (list(expert.parameters()) for expert in moe_layers(model)[0][1].local_experts().values())
    with torch.no_grad():
        first[0].add_(1)
    assert (first[0] - second[0]).abs().min() > 0.9
