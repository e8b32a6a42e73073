# SPDX-License-Identifier: Apache-2.0
"""Experts by grouped matrix products: all experts of a layer in three kernel launches, for GPUs.

Legend: T tokens, D hidden, R routed rows sorted by expert, E experts, I intermediate units, P = 2 I columns of a linear
that holds w1 above w3.

On a GPU a loop over many small experts leaves most of it idle. `torch.nn.functional.grouped_mm` multiplies each
expert's rows by its own matrix in one launch. It wants the experts' weights stacked: where they lie at equal distances
in one memory, as `lie_together` and DeepSpeed's flat buffers have them, they are read where they are; else they are
copied. Each expert keeps parameters of its own, for the optimizer and on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moellava.moe.adapted import Adapted
from moellava.moe.compiled import grouped_product
from moellava.moe.places import Stacked
from moellava.moe.weights import TENSORS, Activation, Layout

ALIGNMENT = 16
"""Bytes that rows of the operands must be a multiple of (the kernels' rule)."""


def can_group(device: torch.device, dtype: torch.dtype, sizes: Iterable[int]) -> bool:
    """Whether grouped kernels run here: a GPU, half precision, aligned sizes, a torch that has them.

    Args:
        device, dtype: of the rows.
        sizes: D and I.
    """
    if device.type != "cuda" or dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    return not any(size * dtype.itemsize % ALIGNMENT for size in sizes)


def run_grouped(
    x_TD: Tensor, gate_R: Tensor, token_R: Tensor, count_E: Tensor, layout: Layout, flat: list[Tensor | None]
) -> Tensor:
    """As `FusedExperts.apply`, differentiated by autograd."""
    experts, ends_E = layout.experts(flat), count_E.cumsum(0).to(torch.int32)

    def linear(role: str, row_RD: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, bias = TENSORS[role]
        y_RI = _product(row_RD, [getattr(expert, weight) for expert in experts], ends_E)
        return y_RI, None if getattr(experts[0], bias) is None else _stacked([getattr(one, bias) for one in experts])

    roles = [role for role, (weight, _) in TENSORS.items() if weight in layout.names]
    return _through(linear, roles, layout.activation, x_TD, gate_R, token_R, count_E)


def run_adapted(x_TD: Tensor, gate_R: Tensor, token_R: Tensor, count_E: Tensor, adapted: Adapted) -> Tensor:
    """The same of experts whose linears are wrapped, in the dtype of x; adapters are read where they lie."""
    ends_E, dtype = count_E.cumsum(0).to(torch.int32), x_TD.dtype

    def linear(role: str, row_RD: Tensor) -> tuple[Tensor, Tensor | None]:
        every = adapted.linears[role]
        first = every[0]
        if callable(first.weight):
            y_RI = FrozenProduct.apply(row_RD, ends_E, [factors.weight for factors in every])
        else:
            y_RI = _product(row_RD, [factors.weight for factors in every], ends_E)
        if first.down_rD is not None:
            down_ErD, up_EIr = _aligned(
                _stacked([factors.down_rD for factors in every]).to(dtype),
                _stacked([factors.up_Ir for factors in every]).to(dtype),
            )
            low_Rr = F.grouped_mm(F.dropout(row_RD, first.dropout), down_ErD.transpose(1, 2), offs=ends_E)
            y_RI = y_RI + F.grouped_mm(low_Rr, up_EIr.transpose(1, 2), offs=ends_E) * first.scale
        return y_RI, None if first.bias is None else _stacked([factors.bias for factors in every]).to(dtype)

    return _through(linear, list(adapted.linears), adapted.activation, x_TD, gate_R, token_R, count_E)


def _through(
    linear: Callable[[str, Tensor], tuple[Tensor, Tensor | None]],
    roles: Collection[str],
    activation: Activation,
    x_TD: Tensor,
    gate_R: Tensor,
    token_R: Tensor,
    count_E: Tensor,
) -> Tensor:
    """Σ over a token's experts of gate × expert(token), [T, D], summed in fp32.

    Args:
        linear: (role, rows) -> what that linear of every expert makes of its rows, and the biases [E, I] to add.
        roles: those that there are.
    """
    every_E = torch.arange(len(count_E), device=x_TD.device)
    expert_R = every_E.repeat_interleave(count_E, output_size=len(token_R))

    def biased(role: str, row_RD: Tensor) -> Tensor:
        y_RI, bias_EI = linear(role, row_RD)
        return y_RI if bias_EI is None else y_RI + bias_EI[expert_R]

    row_RD, gate_R1 = x_TD.index_select(0, token_R), gate_R.unsqueeze(1)
    if "w13" in roles:
        h1_RI, h3_RI = biased("w13", row_RD).chunk(2, dim=1)
        inner_RI = activation(h1_RI) * h3_RI
    else:
        inner_RI = activation(biased("w1", row_RD))
        if "w3" in roles:
            inner_RI = inner_RI * biased("w3", row_RD)
    y_RD, bias_ED = linear("w2", (inner_RI * gate_R1).to(x_TD.dtype))
    if bias_ED is not None:
        y_RD = y_RD + gate_R1 * bias_ED[expert_R]
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    return out_TD.index_add(0, token_R, y_RD.float()).to(x_TD.dtype)


class FrozenProduct(torch.autograd.Function):
    """Rows by their experts' frozen weights, which are made when they are needed: forward and backward, never kept."""

    @staticmethod
    def forward(ctx, row_RD: Tensor, ends_E: Tensor, makers: list[Callable[[], Tensor]]) -> Tensor:
        ctx.makers = makers
        ctx.save_for_backward(ends_E)
        return F.grouped_mm(row_RD, _made(makers, row_RD.dtype).transpose(1, 2), offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RI: Tensor):
        return F.grouped_mm(grad_RI, _made(ctx.makers, grad_RI.dtype), offs=ctx.saved_tensors[0]), None, None


def _made(makers: list[Callable[[], Tensor]], dtype: torch.dtype) -> Tensor:
    """The weights of all experts, [E, I, D]."""
    return torch.stack([make().to(dtype) for make in makers])


def _aligned(down_ErD: Tensor, up_EIr: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of a rank that the kernels take: with zeros behind, which add nothing."""
    lacking = -down_ErD.shape[1] % (ALIGNMENT // down_ErD.element_size())
    return (F.pad(down_ErD, (0, 0, 0, lacking)), F.pad(up_EIr, (0, lacking))) if lacking else (down_ErD, up_EIr)


def _product(row_RD: Tensor, weights: list[Tensor], ends_E: Tensor) -> Tensor:
    """Rows by the weights of their experts, in the rows' dtype."""
    if torch.compiler.is_compiling():
        return grouped_product(row_RD, [weight.to(row_RD.dtype) for weight in weights], ends_E)
    return F.grouped_mm(row_RD, Stacked.apply(*weights).to(row_RD.dtype).transpose(1, 2), offs=ends_E)


def _stacked(tensors: list[Tensor]) -> Tensor:
    """One tensor of each expert as [E, …]."""
    return torch.stack(tensors) if torch.compiler.is_compiling() else Stacked.apply(*tensors)
