# SPDX-License-Identifier: Apache-2.0
"""Runs experts over the tokens that chose them.

Legend: T tokens, N real ones, k choices, D hidden, R routed rows (one per token and choice that is kept) sorted by
expert, n the rows of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moellava.moe.fused import FusedExperts
from moellava.moe.grouped import can_group, run_grouped
from moellava.moe.router import Choice
from moellava.moe.weights import tensors_of


@dataclass
class Dispatch:
    """Routed rows, sorted by expert.

    Args:
        token_R: which row of x each routed row reads and adds to.
        gate_R: weight of the row's output, with gradient.
        counts: rows of each expert, in order; their sum is R.
    """

    token_R: Tensor
    gate_R: Tensor
    counts: list[int]


def sort_by_expert(choice: Choice, gate_Nk: Tensor, n_experts: int) -> Dispatch:
    """Turns choices into rows sorted by expert; in the order of the tokens within one. Drops are left out."""
    k = choice.expert_Nk.shape[1]
    flat_R = choice.expert_Nk.reshape(-1)
    if choice.kept_Nk is None:
        order_R = flat_R.argsort(stable=True)
    else:
        # dropped choices sort behind the last expert
        flat_R = torch.where(choice.kept_Nk.reshape(-1), flat_R, n_experts)
        order_R = flat_R.argsort(stable=True)
    counts = torch.bincount(flat_R, minlength=n_experts).tolist()[:n_experts]
    order_R = order_R[: sum(counts)]
    token_R = order_R // k
    if choice.token_N is not None:
        token_R = choice.token_N[token_R]
    return Dispatch(token_R, gate_Nk.reshape(-1)[order_R], counts)


def run_experts(experts: list[nn.Module], x_TD: Tensor, dispatch: Dispatch) -> Tensor:
    """Σ over a token's experts of gate × expert(token), [T, D].

    An expert without tokens gets a zero gradient and not none: ranks must agree on which parameters have one.
    """
    fusable = None if torch.is_autocast_enabled(x_TD.device.type) else tensors_of(experts)
    if fusable is None:
        return loop_over_experts(experts, x_TD, dispatch)
    layout, flat = fusable
    if can_group(x_TD, layout, flat):
        return run_grouped(x_TD, dispatch.gate_R, dispatch.token_R, dispatch.counts, layout, flat)
    return FusedExperts.apply(x_TD, dispatch.gate_R, dispatch.token_R, dispatch.counts, layout, *flat)


def loop_over_experts(experts: list[nn.Module], x_TD: Tensor, dispatch: Dispatch) -> Tensor:
    """The same by calling each expert: for experts whose linears are wrapped (LoRA, 4-bit), and under autocast."""
    out_TD = torch.zeros_like(x_TD)
    rows = zip(dispatch.token_R.split(dispatch.counts), dispatch.gate_R.split(dispatch.counts), experts, strict=True)
    for token_n, gate_n, expert in rows:
        y_nD = expert(x_TD.index_select(0, token_n))
        out_TD = out_TD.index_add(0, token_n, (y_nD * gate_n.unsqueeze(1)).to(out_TD.dtype))
    return out_TD
