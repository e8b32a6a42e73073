# SPDX-License-Identifier: Apache-2.0
"""The head runs on supervised positions only, in chunks, and the loss is what the full logits would give."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from moellava.model.extended import CappedHead
from moellava.train import loss as loss_module
from moellava.train.loss import SupervisedHead, sums_of_records, supervised_positions
from tests.processes import losses_of, train_here, words_of
from tests.train.live_memory import peak_of

LABELS = torch.tensor([[-100, -100, 7, 8, -100], [5, -100, -100, -100, 9]])


def test_rows_and_targets_are_the_shifted_labels():
    place_N, target_N, shape = supervised_positions(LABELS)
    assert place_N.tolist() == [1, 2, 5 + 3] and shape == (2, 5)
    assert target_N.tolist() == [7, 8, 9]  # label 5 stands at position 0: nothing precedes it
    assert torch.equal(supervised_positions(LABELS, place_N).target_N, target_N)


def heads() -> dict[str, nn.Module]:
    """Of 8 units and 11 words: a plain one, one with a cap, and one with an adapter beside it, which drops."""
    torch.manual_seed(0)

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.dropout = nn.Linear(8, 11).requires_grad_(False), nn.Dropout(0.5)
            self.a, self.b = nn.Linear(8, 2, bias=False), nn.Linear(2, 11, bias=False)

        def forward(self, hidden):
            return self.base(hidden) + self.b(self.a(self.dropout(hidden)))

    frozen = nn.Linear(8, 11, bias=False).requires_grad_(False)
    plain, capped = nn.Linear(8, 11), CappedHead(nn.Linear(8, 11), 3.0)
    return {"plain": plain, "frozen": frozen, "capped": capped, "adapted": Adapted()}


@pytest.mark.parametrize("name", ["plain", "capped"])
def test_chunks_run_as_the_forward_did_under_autocast(name, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 4 * 11)
    head, hidden, labels = heads()[name], torch.randn(3, 6, 8), torch.randint(0, 11, (3, 6))
    with torch.autocast("cpu", torch.bfloat16):
        wanted = step(head, hidden, labels, None)
        found = step(head, hidden, labels, 4)
    torch.testing.assert_close(found, wanted, rtol=5e-2, atol=5e-2)
    in_fp32 = step(head, hidden, labels, None)[0]
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    assert float((found[0] - in_fp32).detach().abs()) > 1e-4


def step(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor, rows: int | None, smoothing: float = 0.0):
    """The loss, and its gradients by the hidden states and the head; in chunks of so many rows, or in one piece."""
    head, hidden = copy.deepcopy(head), hidden.clone().requires_grad_()
    narrowed, supervised = SupervisedHead(head, 11), supervised_positions(labels)
    narrowed.is_last = rows is not None
    torch.manual_seed(3)
    with narrowed.only(supervised):
        logits = head(hidden)
    assert (len(logits) == 0) == (rows is not None and (narrowed.is_plain or rows < len(supervised.target_N)))
    loss = narrowed.loss_sum(logits, supervised.target_N, smoothing)
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return loss, torch.autograd.grad(3 * loss, [hidden, *trained])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [4, 100])
@pytest.mark.parametrize("name", ["plain", "frozen", "capped"])
def test_chunks_add_up_to_the_whole(name, rows, dtype, smoothing, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", rows * 11 + 10)
    head, hidden = heads()[name].to(dtype), torch.randn(3, 6, 8, dtype=dtype)
    labels = torch.randint(0, 11, (3, 6)).masked_fill(torch.rand(3, 6) < 0.3, -100)
    found, wanted = (step(head, hidden, labels, size, smoothing) for size in (rows, None))
    limit = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found, wanted, **limit)


@pytest.mark.parametrize("rows", [1, 7, 64, 300])
def test_a_head_in_16_bits_is_rounded_once_however_many_chunks(rows):
    torch.manual_seed(0)
    hidden, weight = torch.randn(256, 32), torch.randn(97, 32) / 4
    targets = torch.randint(0, 97, (256,))
    wanted = weight.to(torch.bfloat16).double().requires_grad_()
    functional.cross_entropy(hidden.to(torch.bfloat16).double() @ wanted.t(), targets, reduction="sum").backward()
    found = weight.to(torch.bfloat16).requires_grad_()
    options = (hidden.to(torch.bfloat16), found, None, targets, rows, 0.0, torch.bfloat16)
    loss_module.LinearLoss.apply(*options).backward()
    off = (found.grad.double() - wanted.grad).norm() / wanted.grad.norm()
    assert off < 4e-3, "rows added up in chunks of one are 2e-2 off"


def test_what_a_head_draws_is_drawn_again_in_the_backward(monkeypatch):
    """An adapter's dropout: the gradient of the loss that was reported, not of another draw."""
    monkeypatch.setattr(loss_module, "CHUNK", 2 * 11)
    head, hidden, labels = heads()["adapted"], torch.randn(1, 6, 8), torch.arange(6)[None]
    loss, (dhidden, da, db) = step(head, hidden, labels, 2)
    nudged = copy.deepcopy(head)
    nudged.a.weight.data += 1e-3 * da / da.norm()
    assert float(step(nudged, hidden, labels, 2)[0].detach() - loss.detach()) == pytest.approx(
        1e-3 * float(da.norm()) / 3, rel=1e-2
    )
    assert float(db.abs().sum()) and float(dhidden.abs().sum())


def test_sum_and_gradient_equal_those_of_full_logits():
    head, hidden = heads()["plain"], torch.randn(3, 6, 8, requires_grad=True)
    labels = torch.randint(0, 11, (3, 6)).masked_fill(torch.rand(3, 6) < 0.5, -100)
    full = functional.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    (full_gradient,) = torch.autograd.grad(3 * full, hidden)
    loss, (gradient, *_) = step(head, hidden.detach(), labels, None)
    torch.testing.assert_close(loss, full)
    torch.testing.assert_close(gradient, full_gradient)
    SupervisedHead(head, 11)
    assert head(hidden).shape == (3, 6, 11), "outside of `only` the head is untouched"


def test_no_supervised_position_is_zero_with_a_gradient_path():
    head, supervised = nn.Linear(4, 5), supervised_positions(torch.full((2, 3), -100))
    narrowed = SupervisedHead(head, 5)
    with narrowed.only(supervised):
        logits = head(torch.randn(2, 3, 4))
    loss = narrowed.loss_sum(logits, supervised.target_N)
    loss.backward()
    assert loss.item() == 0.0
    assert head.weight.grad.abs().sum() == 0.0


def test_logits_are_kept_by_nobody():
    """Where the loss is taken of logits in one piece, they go when the caller lets go of them."""
    head = nn.Linear(4, 5)
    narrowed, supervised = SupervisedHead(head, 5), supervised_positions(torch.zeros(2, 3, dtype=torch.long))
    with narrowed.only(supervised):
        logits = head(torch.randn(2, 3, 4))
    kept = weakref.ref(logits.untyped_storage())
    del logits
    assert kept() is None


def test_hidden_states_of_another_shape_are_an_error():
    head = nn.Linear(4, 5)
    with (
        SupervisedHead(head, 5).only(supervised_positions(torch.zeros(2, 3, dtype=torch.long))),
        pytest.raises(ValueError, match=r"labels are \[2, 3\], but hidden states \[3, 2\]"),
    ):
        head(torch.randn(3, 2, 4))


@pytest.mark.parametrize(("after", "is_last"), [(lambda logits: logits, True), (lambda logits: logits / 2, False)])
def test_logits_that_a_class_scales_stay_in_one_piece(after, is_last, monkeypatch):
    """Cohere and Granite scale what the head says: chunks of the head alone would train another model."""
    monkeypatch.setattr(loss_module, "CHUNK", 2 * 11)
    head, hidden, supervised = heads()["plain"], torch.randn(1, 6, 8), supervised_positions(torch.arange(6)[None])
    narrowed = SupervisedHead(head, 11)
    narrowed.look(lambda: after(head(hidden)), supervised)
    assert narrowed.is_last is is_last
    with narrowed.only(supervised):
        logits = after(head(hidden))
    wanted = functional.cross_entropy(after(head(hidden))[0, :-1], torch.arange(1, 6), reduction="none")
    torch.testing.assert_close(narrowed.loss_sum(logits, supervised.target_N), wanted.sum())
    with narrowed.only(supervised):
        logits = after(head(hidden))
    losses = narrowed.losses(logits, supervised.target_N)
    torch.testing.assert_close(losses, wanted)
    assert sums_of_records(losses, supervised).tolist() == [[pytest.approx(float(wanted.detach().sum())), 5.0]]


def test_records_keep_their_sums_apart():
    supervised = supervised_positions(LABELS)
    assert sums_of_records(torch.tensor([1.0, 2.0, 4.0]), supervised).tolist() == [[3.0, 2.0], [4.0, 1.0]]


def test_a_step_never_holds_the_logits_of_all_rows():
    """2,048 positions of 151,936 words: a quarter of the memory of full logits at most, however many are trained."""

    def full(model, ids, labels):
        return lambda: model(input_ids=ids, labels=labels, use_cache=False).loss

    def ours(model, ids, labels):
        head, supervised = SupervisedHead(model.lm_head, 151_936), supervised_positions(labels, placed(labels))
        head.is_last = True

        def loss():
            with head.only(supervised):
                logits = model(input_ids=ids, use_cache=False).logits
            return head.loss_sum(logits, supervised.target_N)

        return loss

    wanted = peak_of(large_vocabulary, full, 1.0)
    assert wanted > 2 * 4 * 2048 * 151_936, "logits and their gradient"
    assert [peak_of(large_vocabulary, ours, share) <= 0.25 * wanted for share in (0.05, 0.5, 1.0)] == [True] * 3


def placed(labels: torch.Tensor) -> torch.Tensor:
    """Indices of the supervised positions, of labels whose last ones alone are trained: known without looking."""
    return torch.arange(labels.shape[1] - 1 - labels.trained, labels.shape[1] - 1)


def large_vocabulary() -> LlamaForCausalLM:
    """A language model of one layer, as wide as the smallest with so large a vocabulary. Its head is not tied, for sums
    of tensors that are not there are never made in place."""
    sizes = {"hidden_size": 896, "intermediate_size": 2432, "num_hidden_layers": 1, "num_attention_heads": 14}
    return LlamaForCausalLM(LlamaConfig(vocab_size=151_936, num_key_value_heads=2, tie_word_embeddings=False, **sizes))


CHUNKED = """
from moellava.train import loss, train

loss.CHUNK = 8 * 288
made = []
forward = loss.SupervisedHead._loss
loss.SupervisedHead._loss = lambda self, *given: made.append(1) or forward(self, *given)
whole = loss.LinearLoss.apply
loss.LinearLoss.apply = lambda *given: made.append(2) or whole(*given)
code = train.main(arguments)
report([code, sorted(set(made))])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "ways"), [("scripts/zero3.json", []), (None, [2])])
def test_two_processes_train_in_chunks_or_say_the_same_without(engine, ways, flags_for, launch, tmp_path):
    """Without DeepSpeed the head is one node; under ZeRO-3, which fetches its weight once a forward, in one piece."""
    flags = flags_for(tmp_path, "finetune") | {"max_steps": 2, "save_strategy": "no", "skip_dry_save": True}
    del flags["pretrain_mm_mlp_adapter"]
    flags |= {"untrained_projector": True, "mask_question_tokens": False}
    wanted = losses_of(train_here(flags | {"output_dir": tmp_path / "one", "per_device_train_batch_size": 4}))
    two = flags | {"output_dir": tmp_path / "two"} | ({"deepspeed": engine} if engine else {})
    assert launch(CHUNKED, 2, *words_of(two)) == [[0, ways]] * 2
    assert losses_of(tmp_path / "two") == pytest.approx(wanted, rel=1e-5)
