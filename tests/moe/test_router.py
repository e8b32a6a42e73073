# SPDX-License-Identifier: Apache-2.0
"""Which experts a token visits, and with which weight."""

from __future__ import annotations

import pytest
import torch

from moellava.moe import MoESpec
from moellava.moe.router import Choice, Router, best, capacity, gates, select, whole_sets, within_capacity


def choice_of(expert_Nk, kept_Nk=None):
    return Choice(None, expert_Nk, kept_Nk, torch.zeros(len(expert_Nk), dtype=torch.long), None)


def test_best_is_topk_and_ties_go_to_the_lower_index():
    scores = torch.randn(50, 6)
    assert torch.equal(best(scores, 3), scores.topk(3).indices)
    assert best(torch.zeros(2, 4), 2).tolist() == [[0, 1], [0, 1]]


def test_logits_are_fp32_under_autocast_and_for_bf16_tokens():
    router = Router(8, 4, balanced_by_bias=False)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(5, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = router(x)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, x.float() @ router.weight.t())


def test_jitter_multiplies_the_input():
    router = Router(1, 1, balanced_by_bias=False)
    torch.nn.init.ones_(router.weight)
    factors = router(torch.ones(1000, 1), jitter=0.1)
    assert 0.9 <= factors.min() < 0.92 and 1.08 < factors.max() <= 1.1


def test_gates_are_renormalised_over_the_chosen():
    prob = torch.tensor([[0.5, 0.3, 0.2]])
    weights = gates(prob, choice_of(torch.tensor([[0, 2]])), MoESpec())
    torch.testing.assert_close(weights, torch.tensor([[5 / 7, 2 / 7]]))


def test_a_full_expert_leaves_its_weight_to_the_others():
    prob = torch.tensor([[0.5, 0.3, 0.2]])
    kept = torch.tensor([[True, False]])
    assert gates(prob, choice_of(torch.tensor([[0, 1]]), kept), MoESpec()).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(("top1_gate", "value"), [("exact", 1.0), ("probability", 0.6)])
def test_one_choice_has_the_probability_gradient_either_way(top1_gate, value):
    logit = torch.tensor([[1.0, 0.5]], requires_grad=True)
    prob = logit.softmax(1)
    weight = gates(prob, choice_of(torch.tensor([[0]])), MoESpec(top_k_experts=1, top1_gate=top1_gate))
    torch.testing.assert_close(weight.item(), value if top1_gate == "exact" else prob[0, 0].item())
    weight.sum().backward()
    assert logit.grad.abs().min() > 0.1


def test_the_bias_changes_the_choice_and_not_the_weight():
    prob = torch.tensor([[0.6, 0.3, 0.1]])
    spec = MoESpec(top_k_experts=1, router_balance="bias", top1_gate="probability")
    chosen = select(prob.log(), prob, torch.tensor([0.0, 0.0, 0.9]), spec, training=True)
    assert chosen.tolist() == [[2]]
    torch.testing.assert_close(gates(prob, choice_of(chosen), spec), torch.tensor([[0.1]]))


@pytest.mark.parametrize("balance", ["sequence", "bias"])
def test_rounding_does_not_tear_a_set_of_slices_apart(balance):
    """Sets (0, 1), (2, 3), (4, 5). The second set's scores stand between those of the first."""
    spec = MoESpec(init="granular", granularity=2, num_experts=[6], top_k_experts=2, router_balance=balance)
    bias = torch.zeros(6) if balance == "bias" else None
    near = torch.tensor([[0.5, 0.5 - 2e-7, 0.5 - 1e-7, 0.5 - 1e-7, 0.2, 0.2]])
    assert set(best(near, 2)[0].tolist()) != {0, 1}
    assert sorted(select(near, near, bias, spec, training=False)[0].tolist()) == [0, 1]
    learnt = torch.tensor([[0.5, 0.3, 0.4, 0.4, 0.2, 0.2]])
    assert select(learnt, learnt, bias, spec, training=True)[0].tolist() == [0, 2]
    assert torch.equal(whole_sets(learnt, 2), learnt)


def test_the_sampled_second_expert_is_never_the_first_and_is_plain_in_evaluation():
    torch.manual_seed(0)
    logit = torch.tensor([[4.0, 1.0, 0.9, 0.8]]).repeat(300, 1)
    spec = MoESpec(second_expert="sampled")
    trained = select(logit, logit.softmax(1), None, spec, training=True)
    assert set(trained[:, 0].tolist()) == {0} and set(trained[:, 1].tolist()) == {1, 2, 3}
    plain = select(logit, logit.softmax(1), None, spec, training=False)
    assert set(map(tuple, plain.tolist())) == {(0, 1)}


def test_capacity_is_a_multiple_of_the_even_share():
    spec = MoESpec(capacity_factor=1.5, eval_capacity_factor=2.0, min_capacity=7, drop_tokens=True)
    assert capacity(10, 4, spec, training=True) == 8  # ceil(10 · 2 / 4 · 1.5)
    assert capacity(10, 4, spec, training=False) == 10
    assert capacity(1, 4, spec, training=True) == 7


def test_first_choices_enter_before_second_ones():
    chosen = torch.tensor([[1, 0], [0, 1], [0, 1]])
    assert within_capacity(chosen, 2, 2).tolist() == [[True, False], [True, True], [True, False]]


def test_capacity_agrees_with_the_stock_gate():
    """Same places as deepspeed.moe.sharded_moe.top2gating gives, second choices included."""
    sharded_moe = pytest.importorskip("deepspeed.moe.sharded_moe")
    torch.manual_seed(0)
    logit = torch.randn(40, 4)
    spec = MoESpec(capacity_factor=1.0, drop_tokens=True)
    chosen = select(logit, logit.softmax(1), None, spec, training=True)
    kept = within_capacity(chosen, 4, capacity(40, 4, spec, training=True))
    _, limit, _, index, _, gate, _ = sharded_moe.top2gating(
        logit.clone(), 1.0, 0, drop_tokens=True, top2_2nd_expert_sampling=False, sparse_routes=True
    )
    assert int(limit) == 20 and not kept.all()
    assert torch.equal(index.t() >= 0, kept)
    torch.testing.assert_close(gates(logit.softmax(1), choice_of(chosen, kept), spec), gate.t(), atol=1e-6, rtol=0)
