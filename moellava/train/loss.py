# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy on supervised positions only, and never on more logits at once than fit beside the rest of a step.

The language-model head runs where a label is, and nowhere else (DESIGN, decision 8): with a vocabulary of 150,000 and
one-word answers, the full logits of a batch are larger than everything else in the step. A forward pre-hook on the head
selects the rows, so that HF's forward stays as it is, whichever class it belongs to.

    labels     [B, L]   -100  -100   7     8    -100
    rows       [B, L]    .     x     x     .     .      position i predicts label i + 1
    logits     [N, V]          7     8                  N supervised positions of the batch

Where the logits of all N rows would be more than `CHUNK` numbers, HF's forward sees those of no row. The head runs
over all of them aside, in chunks, and logits are computed again in the backward: no [N, V] exists. A plain linear head
is one autograd node (`LinearLoss`), any other one is called within `torch.utils.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from moellava.constants import IGNORE_INDEX
from moellava.log import get_logger

CHUNK = 2**25
"""Most logits that are held at once: 128 MiB in fp32, some 220 rows of a vocabulary of 150,000. A chunk costs a pass
over the head's weight and its gradient, which so many rows are worth."""


class Supervised(NamedTuple):
    """Where the head has to run, and what it should say there.

    Args:
        place_N: indices into [B, L], flattened, in order: position i if label i + 1 is supervised.
        target_N: the labels of those rows.
        shape: [B, L].
    """

    place_N: Tensor
    target_N: Tensor
    shape: torch.Size


def supervised_positions(labels: Tensor, place_N: Tensor | None = None) -> Supervised:
    """What labels [B, L] ask of the head; they are -100 where nothing is trained.

    Args:
        place_N: see `Supervised`, where it is known. None: it is found, for which the host waits for the device.
    """
    shifted = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    if place_N is None:
        place_N = (shifted != IGNORE_INDEX).nonzero().squeeze(1)
    return Supervised(place_N, shifted.index_select(0, place_N), labels.shape)


class SupervisedHead:
    """Narrows a head's input from [B, L, D] to [N, D] while `only` is active, and takes the loss of what it says.

    Args:
        head: the module that maps hidden states to logits.
        vocabulary: V.

    Attributes:
        is_last: whether the head's output is the model's logits as it is; None: not known yet. Where a class scales or
            caps them afterwards, they are computed in one piece, by its own forward.
    """

    def __init__(self, head: nn.Module, vocabulary: int):
        self.head = head
        self.vocabulary = vocabulary
        self.is_last: bool | None = None
        self._asked: Supervised | None = None
        self._hidden_ND: Tensor | None = None
        self._said: Tensor | None = None
        self._looks = self._peeks = False
        self._autocast = (False, torch.float32)
        head.register_forward_pre_hook(self._select)
        head.register_forward_hook(self._note)

    def _select(self, module: nn.Module, inputs: tuple) -> tuple | None:
        if self._asked is None:
            return None
        hidden, *rest = inputs
        if hidden.shape[:-1] != self._asked.shape:
            raise ValueError(f"labels are {list(self._asked.shape)}, but hidden states {list(hidden.shape[:-1])}")
        hidden_ND = hidden.flatten(0, 1).index_select(0, self._asked.place_N)
        device = hidden.device.type
        self._hidden_ND, self._autocast = None, (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        goes_aside = self.is_last and not self.is_spread and (self.is_plain or len(hidden_ND) > self.rows)
        if self._peeks or goes_aside:
            self._hidden_ND = hidden_ND
            hidden_ND = hidden_ND[:0]  # a single row would read the head's whole weight
        return (hidden_ND, *rest)

    def _note(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if self._looks:  # else logits would stay through the backward, and until the next forward
            self._said = output.detach()

    @property
    def rows(self) -> int:
        """Rows of a chunk."""
        return max(CHUNK // self.vocabulary, 1)

    def may_chunk(self, samples: int, length: int) -> bool:
        """Whether the logits of so many samples of at most so many positions may be too many to be held at once."""
        return samples * length > self.rows

    @property
    def is_spread(self) -> bool:
        """Whether ZeRO-3 fetches the head's weight when it is called, once in a forward and once in a backward: then
        its logits are computed in one piece."""
        return any(hasattr(parameter, "ds_id") for parameter in self.head.parameters())

    @property
    def is_plain(self) -> bool:
        """Whether calling the head multiplies by its weight and does no more: no adapter, nothing offloaded."""
        head, own = self.head, 1  # of each sort of hooks, the one that is set here
        if type(head) is not nn.Linear or "forward" in vars(head):
            return False
        return len(head._forward_pre_hooks) == len(head._forward_hooks) == own

    @contextmanager
    def only(self, supervised: Supervised) -> Iterator[None]:
        """Inside, the head sees the supervised positions, or none where they are for `loss_sum`."""
        self._asked = supervised
        try:
            yield
        finally:
            self._asked = None

    @torch.no_grad()
    def look(self, forward: Callable[[], Tensor], supervised: Supervised) -> None:
        """Finds out `is_last` from a forward, which gives the model's logits. With many processes, on all of them."""
        first = Supervised(supervised.place_N.new_zeros(1), supervised.target_N.new_zeros(1), supervised.shape)
        self._looks = True
        try:
            with self.only(first):
                logits = forward()
        finally:
            self._looks = False
        assert self._said is not None
        self.is_last = logits.shape == self._said.shape and torch.equal(logits, self._said.to(logits.dtype))
        self._said = None
        if not self.is_last:
            get_logger().info("The model does more to logits than its head: they are computed in one piece.")

    @torch.no_grad()
    def seen(self, forward: Callable[[], object], supervised: Supervised) -> Tensor:
        """What the head is given at the supervised positions, [N, D], in a forward."""
        self._peeks = True
        try:
            with self.only(supervised):
                forward()
        finally:
            self._peeks = False
        hidden_ND, self._hidden_ND = self._hidden_ND, None
        assert hidden_ND is not None
        return hidden_ND

    def loss_sum(self, logits: Tensor, target_N: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Summed cross-entropy of the last forward's rows in fp32, a scalar (0 with a gradient path if N is 0).

        Args:
            logits: what that forward gave.
            target_N: see `Supervised`.
        """
        if self._hidden_ND is None:
            return cross_entropy_sum(logits, target_N, label_smoothing)
        if self.is_plain:
            enabled, dtype = self._autocast
            hidden_ND, self._hidden_ND = self._hidden_ND, None
            options = (self.rows, label_smoothing, dtype if enabled else hidden_ND.dtype)
            return LinearLoss.apply(hidden_ND, self.head.weight, self.head.bias, target_N, *options)
        chunks = self._chunks(target_N)
        sums = [checkpoint(self._loss, *one, "sum", label_smoothing, use_reentrant=False) for one in chunks]
        return torch.stack(sums).sum()

    def losses(self, logits: Tensor, target_N: Tensor) -> Tensor:
        """The same of each row, [N], without gradient."""
        if self._hidden_ND is None:
            return functional.cross_entropy(logits.float(), target_N, reduction="none")
        return torch.cat([self._loss(*one, "none", 0.0) for one in self._chunks(target_N)])

    def _chunks(self, target_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Hidden states and targets of each chunk; they are let go of."""
        assert self._hidden_ND is not None
        hidden_ND, self._hidden_ND = self._hidden_ND, None
        return zip(hidden_ND.split(self.rows), target_N.split(self.rows), strict=True)

    def _loss(self, hidden_nD: Tensor, target_n: Tensor, reduction: str, label_smoothing: float) -> Tensor:
        enabled, dtype = self._autocast  # of the model's forward, in which this is a part
        with torch.autocast(hidden_nD.device.type, dtype, enabled):
            logits_nV = self.head(hidden_nD)
        return functional.cross_entropy(
            logits_nV.float(), target_n, reduction=reduction, label_smoothing=label_smoothing
        )


class LinearLoss(torch.autograd.Function):
    """Summed cross-entropy in fp32 of what a linear head says, a scalar; no more logits are held than `rows` have.

    The forward goes through the rows in chunks and keeps of each its log Σ exp, from which the backward has any part of
    the softmax: it goes through the vocabulary, all rows at a time. So each part of the weight's gradient is a single
    product, rounded once, where chunks of rows would be added up in 16 bits; and autograd adds that of a tied embedding
    in place. Logits of a single chunk are kept for the backward.

    Args (of `apply`):
        hidden_ND, weight_VD, bias_V, target_N: rows, the head's tensors, and the labels.
        rows: of a chunk.
        label_smoothing: share of the target that is spread over all words.
        dtype: of the products.
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, target_N, rows: int, label_smoothing: float, dtype: torch.dtype):
        with torch.autocast(hidden_ND.device.type, enabled=False):
            cast_VD, cast_V = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
            losses, lses = [], []
            for one_nD, target_n in zip(hidden_ND.split(rows), target_N.split(rows), strict=True):
                logits_nV = functional.linear(one_nD.to(dtype), cast_VD, cast_V)
                loss_n, lse_n = _losses_and_lse(logits_nV.float(), target_n, label_smoothing)
                losses.append(loss_n)
                lses.append(lse_n)
            ctx.kept_NV = logits_nV if len(losses) == 1 else None
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, torch.cat(lses))
        ctx.options = (rows, label_smoothing, dtype)
        return torch.cat(losses).double().sum().float()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        hidden_ND, own_VD, own_V, target_N, lse_N = ctx.saved_tensors
        rows, label_smoothing, dtype = ctx.options
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        cast_ND, cast_VD, cast_V = hidden_ND.to(dtype), own_VD.to(dtype), None if own_V is None else own_V.to(dtype)
        dhidden_ND = None
        dweight_VD = torch.empty_like(own_VD) if wants_weight else None
        dbias_V = torch.empty_like(own_V) if wants_bias else None
        kept_NV, ctx.kept_NV = ctx.kept_NV, None  # it becomes the gradient
        width = max(rows * len(own_VD) // max(len(hidden_ND), 1), 1)
        for begin in range(0, len(own_VD), width):
            part = slice(begin, begin + width)
            bias_v = None if cast_V is None else cast_V[part]
            logits_Nv = functional.linear(cast_ND, cast_VD[part], bias_v) if kept_NV is None else kept_NV
            dlogits_Nv = _into_gradient(logits_Nv.float(), lse_N, target_N - begin, label_smoothing, len(own_VD))
            dlogits_Nv = dlogits_Nv.mul_(dloss).to(dtype)
            if wants_hidden:
                product_ND = dlogits_Nv @ cast_VD[part]
                dhidden_ND = product_ND if dhidden_ND is None else dhidden_ND.float().add_(product_ND)
            if dweight_VD is not None and own_VD.dtype == dtype:
                torch.mm(dlogits_Nv.t(), cast_ND, out=dweight_VD[part])
            elif dweight_VD is not None:
                dweight_VD[part] = dlogits_Nv.t() @ cast_ND
            if dbias_V is not None:
                dbias_V[part] = dlogits_Nv.sum(0)
        dhidden_ND = None if dhidden_ND is None else dhidden_ND.to(hidden_ND.dtype)
        return dhidden_ND, dweight_VD, dbias_V, None, None, None, None


def _losses_and_lse(logits_nV: Tensor, target_n: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each row, and its log Σ exp."""
    loss_n = functional.cross_entropy(logits_nV, target_n, reduction="none")
    said_n = logits_nV.gather(1, target_n.unsqueeze(1)).squeeze(1)
    lse_n = loss_n + said_n
    if label_smoothing:
        loss_n = loss_n + label_smoothing * (said_n - logits_nV.mean(1))
    return loss_n, lse_n


def _into_gradient(logits_Nv: Tensor, lse_N: Tensor, place_N: Tensor, label_smoothing: float, words: int) -> Tensor:
    """The gradient of the summed cross-entropy by some of the logits, in their place: softmax minus the targets.

    Args:
        lse_N: log Σ exp of each row over the whole vocabulary.
        place_N: where its target stands among these logits; elsewhere: not among them.
        words: V.
    """
    logits_Nv.sub_(lse_N.unsqueeze(1)).exp_()
    if label_smoothing:
        logits_Nv.sub_(label_smoothing / words)
    width = logits_Nv.shape[1]
    is_here_N = (place_N >= 0) & (place_N < width)
    of_target_N1 = is_here_N.to(logits_Nv.dtype).mul_(label_smoothing - 1.0).unsqueeze(1)
    return logits_Nv.scatter_add_(1, place_N.clamp(0, width - 1).unsqueeze(1), of_target_N1)


def cross_entropy_sum(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Summed cross-entropy in fp32: logits [N, V] against targets [N] -> scalar (0 with a gradient path if N is 0)."""
    return functional.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=label_smoothing)


def sums_of_records(losses_N: Tensor, supervised: Supervised) -> Tensor:
    """What each record adds to a loss over many: [B, 2], the summed losses of its rows and their number."""
    records, length = supervised.shape
    of_record = supervised.place_N // length
    sums = torch.stack([losses_N, torch.ones_like(losses_N)], dim=1)
    return torch.zeros(records, 2, device=losses_N.device).index_add_(0, of_record, sums)
