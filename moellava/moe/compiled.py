# SPDX-License-Identifier: Apache-2.0
"""Grouped products as one operation of a compiled graph (`torch.compile`), which cannot look where weights lie.

Legend: R rows sorted by expert, D inputs, I outputs, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from moellava.moe.places import stacked

ALIGNMENT = 16
"""Bytes that rows of the operands must be a multiple of (the kernels' rule)."""


def are_aligned(dtype: torch.dtype, sizes: Iterable[int]) -> bool:
    """Whether rows of these sizes begin where grouped products may read them."""
    return not any(size * dtype.itemsize % ALIGNMENT for size in sizes)


# Schemas are written out, for torch 2.6 reads none off `list[Tensor]`.
@torch.library.custom_op(
    "moellava::grouped_product", mutates_args=(), schema="(Tensor rows, Tensor[] weights, Tensor ends) -> Tensor"
)
def grouped_product(row_RD: Tensor, weights: list[Tensor], ends_E: Tensor) -> Tensor:
    """Rows by the weights [I, D] of their experts: [R, I]. Weights in one memory are read there."""
    if not _are_aligned(row_RD, weights):
        parts = zip(row_RD.split(_counts(ends_E)), weights, strict=True)
        return torch.cat([row_nD @ weight_ID.t() for row_nD, weight_ID in parts])
    return F.grouped_mm(row_RD, stacked(weights).transpose(1, 2), offs=ends_E)


@torch.library.custom_op(
    "moellava::grouped_gradients",
    mutates_args=(),
    schema="(Tensor grad, Tensor rows, Tensor[] weights, Tensor ends) -> (Tensor, Tensor)",
)
def grouped_gradients(grad_RI: Tensor, row_RD: Tensor, weights: list[Tensor], ends_E: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the rows [R, D] and of all weights [E, I, D]."""
    grad_RI = grad_RI.contiguous()
    if not _are_aligned(row_RD, weights):
        counts = _counts(ends_E)
        parts = list(zip(grad_RI.split(counts), row_RD.split(counts), weights, strict=True))
        drow_RD = torch.cat([grad_nI @ weight_ID for grad_nI, _, weight_ID in parts])
        return drow_RD, torch.stack([grad_nI.t() @ row_nD for grad_nI, row_nD, _ in parts])
    drow_RD = F.grouped_mm(grad_RI, stacked(weights), offs=ends_E)
    return drow_RD, F.grouped_mm(grad_RI.t(), row_RD, offs=ends_E)


def _are_aligned(row_RD: Tensor, weights: list[Tensor]) -> bool:
    return are_aligned(row_RD.dtype, weights[0].shape)


def _counts(ends_E: Tensor) -> list[int]:
    """Rows of each expert, which the host waits for."""
    return ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()


@grouped_product.register_fake
def _(row_RD, weights, ends_E):
    return row_RD.new_empty(row_RD.shape[0], weights[0].shape[0])


@grouped_gradients.register_fake
def _(grad_RI, row_RD, weights, ends_E):
    return torch.empty_like(row_RD), row_RD.new_empty(len(weights), *weights[0].shape)


def _keep(ctx, inputs, output) -> None:
    row_RD, weights, ends_E = inputs
    ctx.save_for_backward(row_RD, ends_E, *weights)


def _backward(ctx, grad_RI):
    row_RD, ends_E, *weights = ctx.saved_tensors
    drow_RD, dweight_EID = grouped_gradients(grad_RI, row_RD, weights, ends_E)
    return drow_RD, list(dweight_EID.unbind(0)), None


grouped_product.register_autograd(_backward, setup_context=_keep)
