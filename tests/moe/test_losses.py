# SPDX-License-Identifier: Apache-2.0
"""Router losses against loops over tokens, and what they must not depend on."""

from __future__ import annotations

import math

import pytest
import torch

from moellava.moe import MoESpec
from moellava.moe.losses import combine, record_layer, step_bias
from moellava.moe.router import Choice, Routing, best


def route(logit_NE, sequence_N, k=2):
    prob = logit_NE.softmax(1)
    expert = best(logit_NE.detach(), k)
    return Routing(Choice(None, expert, None, sequence_N, None), prob.gather(1, expert), prob, logit_NE)


def losses(logit_NE, sequence_N, n_sequences, spec, **kwargs):
    return combine([record_layer(route(logit_NE, sequence_N, spec.top_k_experts), n_sequences, spec)], spec, **kwargs)


def balance_by_hand(logits: list[list[float]], k: int) -> float:
    """E · Σ_e f_e P_e over one pool of tokens, in plain Python."""
    n_experts = len(logits[0])
    fraction, mean = [0.0] * n_experts, [0.0] * n_experts
    for row in logits:
        total = sum(math.exp(value) for value in row)
        for expert in range(n_experts):
            mean[expert] += math.exp(row[expert]) / total / len(logits)
        for expert in sorted(range(n_experts), key=lambda e: -row[e])[:k]:
            fraction[expert] += 1 / (k * len(logits))
    return n_experts * sum(f * p for f, p in zip(fraction, mean, strict=True))


@pytest.fixture
def case():
    torch.manual_seed(0)
    sequence = torch.tensor([0] * 7 + [1] * 4 + [2] * 9)
    return torch.randn(20, 5), sequence


@pytest.mark.parametrize("k", [1, 2, 3])
def test_batch_balance_by_hand(case, k):
    logit, sequence = case
    aux = losses(logit, sequence, 3, MoESpec(num_experts=[5], top_k_experts=k, router_balance="batch")).aux
    assert aux.item() == pytest.approx(balance_by_hand(logit.tolist(), k), rel=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_sequence_balance_by_hand(case, k):
    logit, sequence = case
    aux = losses(logit, sequence, 3, MoESpec(num_experts=[5], top_k_experts=k)).aux
    by_hand = sum(
        (sequence == s).sum().item() / 20 * balance_by_hand(logit[sequence == s].tolist(), k) for s in range(3)
    )
    assert aux.item() == pytest.approx(by_hand, rel=1e-5)


def test_first_choice_balance_is_the_stock_loss(case):
    sharded_moe = pytest.importorskip("deepspeed.moe.sharded_moe")
    logit, sequence = case
    spec = MoESpec(num_experts=[5], router_balance="first_choice")
    stock = sharded_moe.top2gating(logit.clone(), 1.0, 0, drop_tokens=False, top2_2nd_expert_sampling=False)[0]
    torch.testing.assert_close(losses(logit, sequence, 3, spec).aux, stock)


def test_z_loss_by_hand(case):
    logit, sequence = case
    z = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logit.tolist()) / 20
    assert losses(logit, sequence, 3, MoESpec(num_experts=[5])).z.item() == pytest.approx(z, rel=1e-5)


@pytest.mark.parametrize("balance", ["sequence", "batch", "first_choice"])
def test_an_even_load_gives_one(balance):
    order = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    logit = torch.cat([order.roll(shift, 1) for shift in range(4)] * 3)
    loss = losses(logit, torch.zeros(12, dtype=torch.long), 1, MoESpec(router_balance=balance))
    assert loss.aux.item() == pytest.approx(1.0, rel=1e-6)


def test_a_collapsed_router_gives_its_worst():
    logit = torch.tensor([[50.0, 49.0, 0.0, 0.0]]).repeat(8, 1)
    assert losses(logit, torch.zeros(8, dtype=torch.long), 1, MoESpec()).aux.item() == pytest.approx(2.0, rel=1e-3)


def test_the_gradient_pushes_towards_idle_experts():
    logit = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(8, 1).requires_grad_()
    losses(logit, torch.zeros(8, dtype=torch.long), 1, MoESpec()).aux.backward()
    assert (logit.grad[:, :2] > 0).all() and (logit.grad[:, 2:] < 0).all()


@pytest.mark.parametrize("sizes", [[20], [11, 9], [7, 4, 9]])
def test_shares_of_micro_batches_add_up(case, sizes):
    """Values and gradients of a batch that is cut between sequences, in any way."""
    logit, sequence = case
    spec = MoESpec(num_experts=[5], router_z_loss_coef=0.3, router_aux_loss_coef=0.7)
    whole = logit.clone().requires_grad_()
    reference = losses(whole, sequence, 3, spec)
    reference.total.backward()
    parts, start = logit.clone().requires_grad_(), 0
    total = torch.zeros(())
    for size in sizes:
        rows = slice(start, start + size)
        numbers = sequence[rows] - sequence[start]
        total = total + losses(parts[rows], numbers, 3, spec, total_tokens=20).total
        start += size
    total.backward()
    torch.testing.assert_close(total, reference.total)
    torch.testing.assert_close(parts.grad, whole.grad)


def test_batch_balance_over_ranks_by_the_reduction_hook(case):
    logit, sequence = case
    spec = MoESpec(num_experts=[5], router_balance="batch")
    whole = logit.clone().requires_grad_()
    losses(whole, sequence, 3, spec).aux.backward()
    halves = [logit[:11].clone().requires_grad_(), logit[11:].clone().requires_grad_()]
    counts = [record_layer(route(h, torch.zeros(len(h), dtype=torch.long)), 1, spec).choices_E for h in halves]
    for half in halves:
        numbers = torch.zeros(len(half), dtype=torch.long)
        losses(half, numbers, 1, spec, total_tokens=20, reduce=lambda own: counts[0] + counts[1]).aux.backward()
    torch.testing.assert_close(torch.cat([half.grad for half in halves]), whole.grad)


def test_layers_with_different_numbers_of_experts_pool_by_mean_or_sum():
    torch.manual_seed(0)
    sequence = torch.zeros(6, dtype=torch.long)
    for pool in ("mean", "sum"):
        spec = MoESpec(num_experts=[2, 4], aux_over_layers=pool)
        records = [record_layer(route(torch.randn(6, e), sequence), 1, spec) for e in (2, 4)]
        result = combine(records, spec)
        expected = sum(result.aux_per_layer) / (2 if pool == "mean" else 1)
        torch.testing.assert_close(result.aux, expected)


@pytest.mark.parametrize("balance", ["bias", "none"])
def test_losses_that_are_only_logged_do_not_train(balance, case):
    result = losses(*case, 3, MoESpec(num_experts=[5], router_balance=balance))
    assert result.total.item() == 0 and result.aux.item() > 0


def test_the_bias_moves_against_the_load():
    bias = torch.zeros(3)
    step_bias(bias, torch.tensor([9.0, 3.0, 6.0]), rate=0.1)
    torch.testing.assert_close(bias, torch.tensor([-0.1, 0.1, 0.0]))
