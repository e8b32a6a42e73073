# SPDX-License-Identifier: Apache-2.0
"""The head runs on supervised positions only, and the loss is what the full logits would give."""

import torch
from torch import nn
from torch.nn import functional

from moellava.train.loss import SupervisedHead, cross_entropy_sum, supervised_positions


def test_rows_and_targets_are_the_shifted_labels():
    labels = torch.tensor([[-100, -100, 7, 8, -100], [5, -100, -100, -100, 9]])
    rows, targets = supervised_positions(labels)
    assert rows.tolist() == [[False, True, True, False, False], [False, False, False, True, False]]
    assert targets.tolist() == [7, 8, 9]  # label 5 stands at position 0: nothing precedes it


def test_sum_and_gradient_equal_those_of_full_logits():
    torch.manual_seed(0)
    hidden = torch.randn(3, 6, 8, requires_grad=True)
    head = nn.Linear(8, 11)
    labels = torch.randint(0, 11, (3, 6)).masked_fill(torch.rand(3, 6) < 0.5, -100)
    full = functional.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    (full_gradient,) = torch.autograd.grad(full, hidden)

    rows, targets = supervised_positions(labels)
    narrowed = SupervisedHead(head)
    with narrowed.only(rows):
        logits = head(hidden)
    assert logits.shape == (int(rows.sum()), 11)
    loss = cross_entropy_sum(logits, targets)
    (gradient,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(loss, full)
    torch.testing.assert_close(gradient, full_gradient)
    assert head(hidden).shape == (3, 6, 11), "outside of `only` the head is untouched"


def test_no_supervised_position_is_zero_with_a_gradient_path():
    head = nn.Linear(4, 5)
    rows, targets = supervised_positions(torch.full((2, 3), -100))
    narrowed = SupervisedHead(head)
    with narrowed.only(rows):
        loss = cross_entropy_sum(head(torch.randn(2, 3, 4)), targets)
    loss.backward()
    assert loss.item() == 0.0
    assert head.weight.grad.abs().sum() == 0.0
