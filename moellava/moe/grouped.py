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

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moellava.moe.weights import Expert, Layout

ALIGNMENT = 16
"""Bytes that rows of the operands must be a multiple of (the kernels' rule)."""


def can_group(x_TD: Tensor, layout: Layout, flat: list[Tensor | None]) -> bool:
    """Whether grouped kernels run here: a GPU, half precision, aligned sizes, a torch that has them."""
    if not x_TD.is_cuda or x_TD.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    w2_DI = layout.experts(flat[: len(layout.names)])[0].w2_DI
    return w2_DI is not None and not any(size * x_TD.element_size() % ALIGNMENT for size in w2_DI.shape)


def run_grouped(
    x_TD: Tensor, gate_R: Tensor, token_R: Tensor, count_E: Tensor, layout: Layout, flat: list[Tensor | None]
) -> Tensor:
    """As `FusedExperts.apply`, differentiated by autograd."""
    experts = layout.experts(flat)
    ends_E = count_E.cumsum(0).to(torch.int32)
    every_E = torch.arange(len(count_E), device=x_TD.device)
    expert_R = every_E.repeat_interleave(count_E, output_size=len(token_R))

    def linear(row_RD: Tensor, weight: str, bias: str, gate_R1: Tensor | None = None) -> Tensor:
        """One linear of every expert over its rows; `gate_R1` weighs the bias."""
        y_RI = F.grouped_mm(row_RD, _stacked(experts, weight).transpose(1, 2), offs=ends_E)
        if getattr(experts[0], bias) is None:
            return y_RI
        bias_RI = _stacked(experts, bias)[expert_R]
        return y_RI + (bias_RI if gate_R1 is None else gate_R1 * bias_RI)

    row_RD, gate_R1 = x_TD.index_select(0, token_R), gate_R.unsqueeze(1)
    if experts[0].w13_PD is not None:
        h1_RI, h3_RI = linear(row_RD, "w13_PD", "b13_P").chunk(2, dim=1)
    else:
        h1_RI = linear(row_RD, "w1_ID", "b1_I")
        h3_RI = linear(row_RD, "w3_ID", "b3_I") if layout.is_gated else None
    inner_RI = layout.activation(h1_RI)
    if h3_RI is not None:
        inner_RI = inner_RI * h3_RI
    y_RD = linear((inner_RI * gate_R1).to(x_TD.dtype), "w2_DI", "b2_D", gate_R1)
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    return out_TD.index_add(0, token_R, y_RD.float()).to(x_TD.dtype)


def _stacked(experts: list[Expert], name: str) -> Tensor:
    """One tensor of each expert as [E, …]."""
    return Stacked.apply(*(getattr(expert, name) for expert in experts))


class Stacked(torch.autograd.Function):
    """Tensors of one shape as one, without a copy where they lie at equal distances; each gets its own gradient."""

    @staticmethod
    def forward(ctx, *tensors: Tensor) -> Tensor:
        found = in_place(tensors)
        return torch.stack(tensors) if found is None else found

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.unbind(0)


def in_place(tensors: Sequence[Tensor]) -> Tensor | None:
    """The tensors stacked where they are, [E, …]; None where they do not lie at equal distances in one memory."""
    first, offsets = tensors[0], [tensor.storage_offset() for tensor in tensors]
    alike = {(t.untyped_storage().data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors}
    steps = {after - before for before, after in zip(offsets, offsets[1:], strict=False)}
    if len(alike) > 1 or len(steps) > 1 or min(steps, default=1) <= 0 or first.device.type == "meta":
        return None
    memory = torch.empty(
        0, dtype=first.dtype, device=first.device
    )  # no view of a parameter, which autograd would watch
    distance = next(iter(steps), first.numel())
    return memory.set_(first.untyped_storage(), offsets[0], (len(tensors), *first.shape), (distance, *first.stride()))


@torch.no_grad()
def lie_together(experts: Sequence[nn.Module]) -> None:
    """Moves the parameters of experts that are alike into one memory for each name, where they are not in one already.

    They stay the parameters that they are. Not under DeepSpeed, whose flat buffers they must not leave.
    """
    names = [name for name, _ in experts[0].named_parameters()]
    for name in names:
        parameters = [expert.get_parameter(name) for expert in experts]
        if in_place(parameters) is not None:
            continue
        with torch.inference_mode(False):
            together = torch.stack([parameter.data for parameter in parameters])
        for parameter, place in zip(parameters, together.unbind(0), strict=True):
            parameter.data = place
