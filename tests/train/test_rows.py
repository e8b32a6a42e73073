# SPDX-License-Identifier: Apache-2.0
"""Dense MLPs run over the rows that are read, and the loss and its gradients stay what they are."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moellava.data.places import places_of
from moellava.moe import MoESpec, upcycle
from moellava.train.loss import SupervisedHead, supervised_positions
from moellava.train.rows import NeededRows, narrowable

MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 0, 0, 0]])
LABELS = torch.tensor([[-100, -100, -100, -100, -100, 10], [-100, -100, 13, -100, -100, -100]])
REAL, TRAINED, ALL = 9, 2, 12
"""Positions of the batch: tokens, those whose next one is trained, and all."""


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).train()


def step(model: LlamaForCausalLM, narrows: bool) -> tuple[torch.Tensor, list[torch.Tensor | None], list[int]]:
    """The loss of the batch, all gradients, and the rows that the last linear of each layer's MLP and of the last
    attention ran over (again, recomputed)."""
    head, rows, ran = SupervisedHead(model.lm_head, 32), NeededRows(model), []
    supervised, places = supervised_positions(LABELS), places_of(LABELS, MASK)
    forward = lambda: model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits  # noqa: E731
    if narrows:
        rows.begin(model, lambda: head.seen(forward, supervised), places, supervised)
    layers = model.model.layers
    for linear in [*(layer.mlp.down_proj for layer in layers), layers[-1].self_attn.o_proj]:
        linear.register_forward_hook(lambda _, inputs, __: ran.append(inputs[0][..., 0].numel()))
    with rows.only_within():
        with head.only(supervised):
            loss = head.loss_sum(forward(), supervised.target_N)
        loss.backward()
    counts = list(ran)
    ran.clear()
    with torch.no_grad():
        forward()
    assert ran == [ALL] * 4  # what comes next is not known
    return loss.detach(), [parameter.grad for parameter in model.parameters()], counts


@pytest.mark.parametrize("recomputes", [False, True])
def test_the_loss_and_its_gradients_stay(recomputes):
    found, wanted = tiny(), tiny()
    if recomputes:
        found.gradient_checkpointing_enable({"use_reentrant": False})
    loss, gradients, counts = step(found, narrows=True)
    assert sorted(counts) == sorted([REAL, REAL, TRAINED, TRAINED] * (2 if recomputes else 1))
    expected, expected_gradients, all_rows = step(wanted, narrows=False)
    assert all_rows == [ALL] * 4
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


def test_a_model_that_reads_more_runs_over_all_positions():
    model = tiny()
    model.model.norm.register_forward_pre_hook(lambda _, inputs: (inputs[0] + inputs[0].mean(1, keepdim=True),))
    assert step(model, narrows=True)[2] == [ALL] * 4


NOTHING = torch.full_like(LABELS, -100)


@pytest.mark.parametrize(
    ("labels", "others", "is_exact"),
    [(LABELS, [0, 0], True), (LABELS, [0, 1], False), (NOTHING, [1, 0], True), (NOTHING, [0, 0], None)],
)
def test_processes_agree_whether_rows_are_picked(labels, others, is_exact, monkeypatch):
    """Those without labels know nothing; one that finds another loss decides for all."""
    monkeypatch.setattr("moellava.train.rows.sum_over_processes", lambda votes: votes + torch.tensor(others).float())
    model = tiny()
    head, rows, supervised = SupervisedHead(model.lm_head, 32), NeededRows(model), supervised_positions(labels)
    forward = lambda: model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits  # noqa: E731
    rows.begin(model, lambda: head.seen(forward, supervised), places_of(labels, MASK), supervised)
    assert rows.is_exact is is_exact
    assert (rows._modules[0].told is not None) == bool(is_exact)


@pytest.mark.parametrize("split", [False, True])
def test_full_rows_are_picked_where_weights_are_split(split):
    """ZeRO-3: whatever a batch holds, all processes do the same."""
    model, full = tiny(), torch.ones_like(MASK)
    if split:
        model.lm_head.weight.ds_id = 0
    head, rows, supervised = SupervisedHead(model.lm_head, 32), NeededRows(model), supervised_positions(LABELS)
    forward = lambda: model(input_ids=IDS, attention_mask=full, use_cache=False).logits  # noqa: E731
    rows.begin(model, lambda: head.seen(forward, supervised), places_of(LABELS, full), supervised)
    assert [one.told is not None for one in rows._modules] == [split, split, True, True]


class DropPath(torch.nn.Module):
    drop_prob = 0.1


def test_padding_that_counts_and_rows_that_drop_are_left_alone():
    preset = MoESpec(moe_mode="sparse", num_experts=[2], router_balance="first_choice")
    assert NeededRows(upcycle(tiny(), preset)).is_exact is False
    model = tiny()
    for layer in model.model.layers:
        layer.mlp.drop = DropPath()
        layer.self_attn.o_proj.drop = DropPath()
    assert NeededRows(model).is_exact is False


def test_the_end_of_the_last_attention_is_narrowed_where_no_router_looks_at_the_rest():
    model = tiny()
    layers = model.model.layers
    assert narrowable(model)[2:] == [(layers[2].mlp, True), (layers[2].self_attn.o_proj, True)]
    layers[2].mlp.dropout = torch.nn.Dropout(0.1)
    layers[2].self_attn.o_proj.drop = DropPath()
    assert narrowable(model)[2:] == [(layers[2].mlp, True)]
    sparse = upcycle(tiny(), MoESpec(moe_mode="sparse", num_experts=[2]))
    assert narrowable(sparse) == [(sparse.model.layers[1].mlp, False)]
    natively = LlamaForCausalLM(tiny().config)
    natively.model.layers[2].mlp = torch.nn.ModuleDict({"gate": torch.nn.Linear(16, 2), "experts": torch.nn.Identity()})
    assert narrowable(natively) == [(layer.mlp, False) for layer in natively.model.layers[:2]]
