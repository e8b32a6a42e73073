# SPDX-License-Identifier: Apache-2.0
"""Experts by grouped matrix products: all experts of a layer in three kernel launches, for GPUs.

Legend: T tokens, D hidden, R routed rows sorted by expert, E experts, I intermediate units, P = 2 I columns of a linear
that holds w1 above w3.

On a GPU a loop over many small experts leaves most of it idle. `torch.nn.functional.grouped_mm` multiplies each
expert's rows by its own matrix in one launch. It needs the experts' weights stacked, which costs one copy of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    x_TD: Tensor, gate_R: Tensor, token_R: Tensor, counts: list[int], layout: Layout, flat: list[Tensor | None]
) -> Tensor:
    """As `FusedExperts.apply`, differentiated by autograd."""
    experts = layout.experts(flat)
    ends_E = torch.tensor(counts, device=x_TD.device).cumsum(0).to(torch.int32)
    expert_R = torch.arange(len(counts), device=x_TD.device).repeat_interleave(
        torch.tensor(counts, device=x_TD.device), output_size=len(token_R)
    )

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
    return torch.stack([getattr(expert, name) for expert in experts])
