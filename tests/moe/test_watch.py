# SPDX-License-Identifier: Apache-2.0
"""Routing is watched in one place, for layers of ours and for language models that are sparse of themselves."""

from __future__ import annotations

import pytest
import torch

from moellava.errors import UserError
from moellava.moe import MoESpec, moe_layers, set_routing_context, upcycle
from moellava.moe.watch import Routed, require_heard, watched_routing
from tests import tiny
from tests.model.tiny_language_models import SPARSE
from tests.moe.test_own_routers import composed

NOT_MOE, SILENT = ("zamba",), ("jetmoe", "llama4_text")
"""Whose layers have lists of MLPs that are no experts; and who calls experts without the indices of the choices."""


@pytest.fixture
def sparse():
    """A tiny model of ours, one expert of which is never chosen."""
    model = upcycle(tiny.tiny_llava(), MoESpec(num_experts=[4], moe_mode="sparse"))
    for _, layer in moe_layers(model):
        layer.router.weight.data[3] = -layer.router.weight.data[:3].sum(0) * 9
    return model.eval()


def watch_once(model, batch) -> list[Routed]:
    with torch.no_grad(), watched_routing(model) as watch:
        model(**batch)
        taken = watch.take()
        assert watch.take() == []
    return taken


def test_layers_of_ours_are_watched_as_they_route(sparse):
    batch = tiny.batch_for(sparse)
    token_mask = batch["attention_mask"].bool()
    set_routing_context(sparse, token_mask=token_mask)
    before = [layer.stats for _, layer in moe_layers(sparse)]
    seen = watch_once(sparse, batch)
    assert [one.layer for one in seen] == [0, 2]
    assert [layer.stats for _, layer in moe_layers(sparse)] == before
    inputs = {}
    first = moe_layers(sparse)[0][1]
    hook = first.register_forward_pre_hook(lambda module, given: inputs.update(x=given[0]))
    sparse(**batch)
    hook.remove()
    logits = first.router(inputs["x"][token_mask])
    assert torch.equal(seen[0].token_N, token_mask.reshape(-1).nonzero()[:, 0])
    assert torch.equal(seen[0].expert_Nk, logits.topk(2, dim=1).indices)
    prob = logits.softmax(1)
    torch.testing.assert_close(seen[0].entropy_N, -(prob * prob.log()).sum(1))
    torch.testing.assert_close(seen[0].gate_Nk.sum(1), torch.ones(int(token_mask.sum())))
    assert seen[0].kept_Nk is None and seen[0].n_experts == 4


def test_what_is_dropped_is_seen():
    drops = {"drop_tokens": True, "capacity_factor": 0.5, "eval_capacity_factor": 0.5}
    spec = MoESpec(num_experts=[4], moe_mode="sparse", **drops)
    model = upcycle(tiny.tiny_llava(), spec).eval()
    seen = watch_once(model, tiny.batch_for(model))
    for one in seen:
        counts = torch.bincount(one.expert_Nk.reshape(-1), minlength=4)
        limit = -(-len(one.expert_Nk) * 2 // 8)
        assert int((~one.kept_Nk).sum()) == int((counts - limit).clamp_min(0).sum()) > 0


def check_own(model_type: str) -> list[Routed]:
    """What a language model of a class tells of itself, composed with a tower."""
    _, model = composed(model_type)
    ids = torch.randint(20, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    seen = watch_once(model.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    hooks = [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]
    assert not [module for module in hooks if any(layer is module for layer in model.get_decoder().layers)]
    for one in seen:
        assert len(one.expert_Nk) == ids.numel() == len(one.gate_Nk) and one.gate_Nk.shape == one.expert_Nk.shape
        assert int(one.expert_Nk.min()) >= 0 and int(one.expert_Nk.max()) < one.n_experts
        assert all(len(set(row)) == len(row) for row in one.expert_Nk.tolist())
        if one.entropy_N is not None:
            assert bool((one.entropy_N <= torch.tensor(float(one.n_experts)).log() + 1e-4).all())
    return seen


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v2", "gpt_oss"])
def test_a_language_model_that_is_sparse_of_itself_is_watched(model_type):
    assert len(check_own(model_type)) > 0


def test_choices_are_those_of_its_router():
    _, model = composed("qwen3_moe")
    gate = model.get_decoder().layers[0].mlp.gate
    said = []
    hook = gate.register_forward_hook(lambda module, inputs, output: said.append(output))
    ids = torch.arange(20, 30)[None]
    seen = watch_once(model.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    hook.remove()
    logits, _, chosen = said[0]
    assert torch.equal(seen[0].expert_Nk, chosen)
    prob = logits.float().softmax(1)
    torch.testing.assert_close(seen[0].entropy_N, -(prob * prob.log()).sum(1))


@pytest.mark.slow
def test_every_language_model_that_is_sparse_of_itself_is_watched_or_refused():
    heard = {name: len(check_own(name)) for name in [*SPARSE.split(), "dbrx"]}
    assert sorted(name for name, count in heard.items() if not count) == sorted((*NOT_MOE, *SILENT))
    _, model = composed("jetmoe")
    with pytest.raises(UserError, match="JetMoeModel.*cannot be watched"):
        require_heard([], model)


def test_a_dense_model_is_refused():
    with pytest.raises(UserError, match="is dense: it has no experts"):
        with watched_routing(tiny.tiny_llava()):
            pass
