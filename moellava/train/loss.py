# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy on supervised positions only.

The language-model head runs where a label is, and nowhere else (DESIGN, decision 8): with a vocabulary of 150,000 and
one-word answers, the full logits of a batch are larger than everything else in the step. A forward pre-hook on the head
selects the rows, so that HF's forward stays as it is, whichever class it belongs to.

    labels     [B, L]   -100  -100   7     8    -100
    rows       [B, L]    .     x     x     .     .      position i predicts label i + 1
    logits     [N, V]          7     8                  N supervised positions of the batch
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

from moellava.constants import IGNORE_INDEX


def supervised_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the head has to run, and what it should say there.

    Args:
        labels: [B, L] token ids, -100 where nothing is trained.

    Returns:
        rows: [B, L] bool, true at position i if label i + 1 is supervised.
        targets: [N] the labels of those rows, in row-major order.
    """
    shifted = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    rows = shifted != IGNORE_INDEX
    return rows, shifted[rows]


class SupervisedHead:
    """Narrows a head's input from [B, L, D] to [N, D] while `only` is active.

    Args:
        head: the module that maps hidden states to logits.
    """

    def __init__(self, head: nn.Module):
        self._rows: torch.Tensor | None = None
        head.register_forward_pre_hook(self._select)

    def _select(self, module: nn.Module, inputs: tuple) -> tuple | None:
        if self._rows is None:
            return None
        hidden, *rest = inputs
        return (hidden[self._rows], *rest)

    @contextmanager
    def only(self, rows: torch.Tensor) -> Iterator[None]:
        """Inside, the head sees the positions where `rows` [B, L] is true."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Summed cross-entropy in fp32: logits [N, V] against targets [N] -> scalar (0 with a gradient path if N is 0)."""
    return functional.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=label_smoothing)


def cross_entropy_rows(logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """What each record adds to a loss over many: logits [N, V], targets [N], rows [B, L] true at those N -> [B, 2], the
    summed cross-entropy of a record in fp32 and the number of its supervised tokens."""
    each = functional.cross_entropy(logits.float(), targets, reduction="none")
    of_record = rows.nonzero()[:, 0]
    sums = torch.stack([each, torch.ones_like(each)], dim=1)
    return torch.zeros(len(rows), 2, device=each.device).index_add_(0, of_record, sums)
