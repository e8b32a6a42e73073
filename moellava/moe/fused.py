# SPDX-License-Identifier: Apache-2.0
"""Experts as one autograd node: few operations per expert, and nothing kept that can be computed again.

Legend: T tokens, D hidden, I intermediate units, R routed rows sorted by expert, n the rows of one expert, M those of
the fullest one, b those of an elementwise block. Weights are named in `moe/weights.py`; dx is the gradient of x.

A loop over `expert(rows)` under autograd spends its time on what surrounds the matrix products: rows copied for all
experts at once, a full-size gradient for each, five saved tensors per row, elementwise passes over more than the
cache holds. Here an expert's rows stay in the cache from the gather to the addition, elementwise work goes in blocks
and in place, and only the input linears' results are saved. In the backward the gate is multiplied into the gathered
gradient; its own gradient is then what is left of the units' gradient, divided by the gate at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moellava.moe.activations import KERNELS, kernel_name
from moellava.moe.router import is_at_hand
from moellava.moe.weights import Activation, Layout

BLOCK = 65_536
"""Elements of an elementwise block: the six fp32 tensors of one stay near a core's L2 cache (half or twice: alike). On
a GPU all rows of an expert are one."""


class FusedExperts(torch.autograd.Function):
    """Σ over a token's experts of gate × expert(token), [T, D], summed in fp32.

    Args (of `apply`):
        x_TD, gate_R, token_R, counts: tokens and their `Dispatch`.
        layout, flat: those of `tensors_of`. Tensors of another dtype (autocast) are cast where they are read: of all
            experts none is kept twice.
    """

    @staticmethod
    def forward(ctx, x_TD, gate_R, token_R, counts, layout: Layout, *flat):
        experts = layout.experts(flat)
        width, most = experts[0].width, max(counts)
        rows = max(BLOCK // width, 1) if is_at_hand(x_TD) else len(token_R)  # of a block
        h1_RI = x_TD.new_empty(len(token_R), width)
        h3_RI = torch.empty_like(h1_RI) if layout.is_gated else None
        x_MD, inner_MI = x_TD.new_empty(most, x_TD.shape[1]), x_TD.new_empty(most, width)
        y_MD = torch.empty_like(x_MD)
        row_MD = y_MD.float()  # the same memory if that is fp32 already
        out_TD = torch.zeros(x_TD.shape, dtype=row_MD.dtype, device=x_TD.device)
        parts = _cut(counts, token_R, gate_R.unsqueeze(1), h1_RI, h3_RI)
        for expert, count, (token_n, gate_n1, h1_nI, h3_nI) in zip(experts, counts, parts, strict=True):
            if not count:
                continue
            expert, inner_nI, y_nD = expert.to(x_TD.dtype), inner_MI[:count], y_MD[:count]
            x_nD = torch.index_select(x_TD, 0, token_n, out=x_MD[:count])
            _linear(x_nD, expert.w1_ID, expert.b1_I, h1_nI)
            if h3_nI is not None:
                _linear(x_nD, expert.w3_ID, expert.b3_I, h3_nI)
            _inner(rows, layout.activation, h1_nI, h3_nI, inner_nI)
            _linear(inner_nI, expert.w2_DI, expert.b2_D, y_nD)
            out_TD.index_add_(0, token_n, torch.mul(y_nD, gate_n1, out=row_MD[:count]))
        ctx.counts, ctx.layout, ctx.rows = counts, layout, rows
        ctx.save_for_backward(x_TD, gate_R, token_R, h1_RI, h3_RI, *flat)
        return out_TD.to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_TD):
        counts, layout = ctx.counts, ctx.layout
        x_TD, gate_R, token_R, h1_RI, h3_RI, *flat = ctx.saved_tensors
        dflat = [torch.empty_like(t) if needed else None for t, needed in zip(flat, ctx.needs_input_grad[5:])]
        dx_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        dgate_R = torch.empty_like(gate_R)
        most, width = max(counts), h1_RI.shape[1]
        dy_MD, inner_MI = dout_TD.new_empty(most, x_TD.shape[1]), dout_TD.new_empty(most, width)
        x_MD, dh1_MI = torch.empty_like(dy_MD), torch.empty_like(inner_MI)
        dh3_MI = torch.empty_like(inner_MI) if layout.is_gated else None
        experts, dexperts = layout.experts(flat), layout.experts(dflat)
        parts = _cut(counts, token_R, gate_R.unsqueeze(1), dgate_R, h1_RI, h3_RI)
        for expert, dexpert, count, part in zip(experts, dexperts, counts, parts, strict=True):
            if not count:
                dexpert.zero_()  # it is touched all the same
                continue
            expert, (token_n, gate_n1, dgate_n, h1_nI, h3_nI) = expert.to(x_TD.dtype), part
            inner_nI, dh1_nI, dh3_nI = inner_MI[:count], dh1_MI[:count], None if dh3_MI is None else dh3_MI[:count]
            dy_nD = torch.index_select(dout_TD, 0, token_n, out=dy_MD[:count]).mul_(gate_n1)
            torch.mm(dy_nD, expert.w2_DI, out=dh1_nI)
            _inner_backward(ctx.rows, layout.activation, h1_nI, h3_nI, dh1_nI, dh3_nI, inner_nI, dgate_n)
            if expert.b2_D is not None:
                dgate_n += dy_nD.float() @ expert.b2_D.float()
            _linear_backward(dy_nD, inner_nI, dexpert.w2_DI, dexpert.b2_D)
            x_nD = torch.index_select(x_TD, 0, token_n, out=x_MD[:count])
            _linear_backward(dh1_nI, x_nD, dexpert.w1_ID, dexpert.b1_I)
            dx_nD = torch.mm(dh1_nI, expert.w1_ID, out=dy_nD)  # whose values are used up
            if dh3_nI is not None:
                _linear_backward(dh3_nI, x_nD, dexpert.w3_ID, dexpert.b3_I)
                dx_nD.addmm_(dh3_nI, expert.w3_ID)
            dx_TD.index_add_(0, token_n, dx_nD.float())
        dgate_R /= gate_R.clamp_min(torch.finfo(gate_R.dtype).tiny)  # at 0 the softmax behind it has no gradient
        return dx_TD.to(x_TD.dtype), dgate_R, None, None, None, *dflat


def _cut(sizes: int | list[int], *of_rows: Tensor | None) -> Iterator[tuple]:
    """Tensors of the same rows, cut alike: into pieces of a size, or of these sizes. What is None stays None."""
    return zip(*(repeat(None) if tensor is None else tensor.split(sizes) for tensor in of_rows))


def _linear(x_nD: Tensor, weight_ID: Tensor, bias_I: Tensor | None, out_nI: Tensor) -> None:
    """A linear that writes into given memory."""
    if bias_I is None:
        torch.mm(x_nD, weight_ID.t(), out=out_nI)
    else:
        torch.addmm(bias_I, x_nD, weight_ID.t(), out=out_nI)


def _linear_backward(dy_nI: Tensor, x_nD: Tensor, dweight_ID: Tensor | None, dbias_I: Tensor | None) -> None:
    """The gradients of a linear's weight and bias, into given memory (None: not wanted)."""
    if dweight_ID is not None and dweight_ID.dtype == x_nD.dtype:
        torch.mm(dy_nI.t(), x_nD, out=dweight_ID)
    elif dweight_ID is not None:
        dweight_ID.copy_(dy_nI.t() @ x_nD)
    if dbias_I is not None:
        torch.sum(dy_nI, 0, dtype=dbias_I.dtype, out=dbias_I)


def _blocks(rows: int, *of_rows: Tensor | None) -> Iterator[tuple]:
    """Tensors of the same rows, cut alike into blocks of so many."""
    first = of_rows[0]
    assert first is not None
    if rows >= len(first):
        return iter([of_rows])  # uncut: of many experts each has few rows, and cutting takes as long as computing
    return _cut(rows, *of_rows)


def _inner(rows: int, activation: Activation, h1_nI: Tensor, h3_nI: Tensor | None, out_nI: Tensor) -> None:
    """The units act(h1) [× h3], into given memory, block by block."""
    for out_bI, h1_bI, h3_bI in _blocks(rows, out_nI, h1_nI, h3_nI):
        activate(activation, h1_bI, out_bI)
        if h3_bI is not None:
            out_bI.mul_(h3_bI)


def _inner_backward(
    rows: int,
    activation: Activation,
    h1_nI: Tensor,
    h3_nI: Tensor | None,
    dh1_nI: Tensor,
    dh3_nI: Tensor | None,
    inner_nI: Tensor,
    dgate_n: Tensor,
) -> None:
    """The units again, the gradients of h1 and h3, and Σ dz × units of each row.

    Where the gradient of h1 goes stands dz, the gradient of the units, before.
    """
    of_rows = (inner_nI, dh1_nI, dgate_n, h1_nI, h3_nI, dh3_nI)
    for inner_bI, dz_bI, dgate_b, h1_bI, h3_bI, dh3_bI in _blocks(rows, *of_rows):
        if h3_bI is not None:
            activate(activation, h1_bI, dh3_bI)
            torch.mul(dh3_bI, h3_bI, out=inner_bI)
            dh3_bI.mul_(dz_bI)
            torch.sum(dh3_bI * h3_bI, 1, dtype=dgate_n.dtype, out=dgate_b)
            dz_bI.mul_(h3_bI)
        else:
            activate(activation, h1_bI, inner_bI)
            torch.sum(dz_bI * inner_bI, 1, dtype=dgate_n.dtype, out=dgate_b)
        activation_backward(activation, h1_bI, dz_bI)


def activate(activation: Activation, x: Tensor, out: Tensor) -> None:
    """An elementwise function, into given memory."""
    name = kernel_name(activation)
    if name is None:
        out.copy_(activation(x))
    else:
        KERNELS[name].forward(x, out)


def activation_backward(activation: Activation, x: Tensor, grad: Tensor) -> None:
    """Gradient of an elementwise function, in place of that of its result."""
    name = kernel_name(activation)
    if name is not None:
        KERNELS[name].backward(x, grad)
        return
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = activation(x)
    grad.copy_(torch.autograd.grad(y, x, grad)[0])
