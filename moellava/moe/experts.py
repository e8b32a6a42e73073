# SPDX-License-Identifier: Apache-2.0
"""Runs experts over the tokens that chose them.

Legend: T tokens, N real ones, k choices, D hidden, R routed rows (one per token and choice that is kept) sorted by
expert, n the rows of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from moellava.moe.adapted import Adapted, adapted_of
from moellava.moe.fused import FusedExperts
from moellava.moe.grouped import can_group, run_adapted, run_grouped
from moellava.moe.losses import tally
from moellava.moe.router import Choice, is_at_hand
from moellava.moe.weights import Layout, tensors_of


@dataclass
class Dispatch:
    """Routed rows, sorted by expert.

    Args:
        token_R: which row of x each routed row reads and adds to.
        gate_R: weight of the row's output, with gradient.
        count_E: rows of each expert, in order; their sum is R.
    """

    token_R: Tensor
    gate_R: Tensor
    count_E: Tensor

    @cached_property
    def counts(self) -> list[int]:
        """`count_E` as numbers. On a GPU the host waits for them, which grouped products do without."""
        return self.count_E.tolist()


def sort_by_expert(choice: Choice, gate_Nk: Tensor, n_experts: int, leave_out: bool | None = None) -> Dispatch:
    """Turns choices into rows sorted by expert; in the order of the tokens within one.

    Args:
        leave_out: whether there are no rows of dropped choices. Else they are rows like any other, whose gate is 0: on
            a GPU (the default there), knowing how many they are would take longer than running them.
    """
    k = choice.expert_Nk.shape[1]
    flat_R = choice.expert_Nk.reshape(-1)
    leaves_out = is_at_hand(flat_R) if leave_out is None else leave_out
    if choice.kept_Nk is not None and leaves_out:
        # dropped choices sort behind the last expert
        flat_R = torch.where(choice.kept_Nk.reshape(-1), flat_R, n_experts)
    order_R = flat_R.argsort(stable=True)
    count_E = tally(flat_R, n_experts + 1)[:n_experts]
    if choice.kept_Nk is not None and leaves_out:
        order_R = order_R[: int(count_E.sum())]
    token_R = order_R // k
    if choice.token_N is not None:
        token_R = choice.token_N.index_select(0, token_R)
    return Dispatch(token_R, gate_Nk.reshape(-1).index_select(0, order_R), count_E)


def run_experts(experts: list[nn.Module], x_TD: Tensor, dispatch: Dispatch) -> Tensor:
    """Σ over a token's experts of gate × expert(token), [T, D].

    Under autocast the products run in its dtype, and sums in fp32. An expert without tokens gets a zero gradient and
    not none: ranks must agree on which parameters have one.
    """
    device = x_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype
    fusable, cast_TD = tensors_of(experts), x_TD.to(dtype)
    wrapped = None if fusable is not None else _wrapped(experts, cast_TD)
    if fusable is None and wrapped is None:
        return loop_over_experts(experts, x_TD, dispatch)
    with torch.autocast(device, enabled=False):
        if wrapped is not None:
            rows = (dispatch.gate_R, dispatch.token_R, dispatch.count_E)
            return run_adapted(cast_TD, *rows, wrapped).to(x_TD.dtype)
        assert fusable is not None
        layout, flat = fusable
        cast = flat if dtype == x_TD.dtype else [tensor if tensor is None else tensor.to(dtype) for tensor in flat]
        return _run_tensors(cast_TD, dispatch, layout, cast).to(x_TD.dtype)


def _wrapped(experts: list[nn.Module], x_TD: Tensor) -> Adapted | None:
    """The tensors of experts whose linears are wrapped, where grouped products run; else they are called."""
    if not can_group(x_TD, x_TD.shape[1:]):
        return None
    wrapped = adapted_of(experts)
    return wrapped if wrapped is not None and can_group(x_TD, wrapped.linears["w2"][0].sizes) else None


def _run_tensors(x_TD: Tensor, dispatch: Dispatch, layout: Layout, flat: list[Tensor | None]) -> Tensor:
    w2_DI = layout.experts(flat[: len(layout.names)])[0].w2_DI
    if torch.compiler.is_compiling() or (w2_DI is not None and can_group(x_TD, w2_DI.shape)):
        return run_grouped(x_TD, dispatch.gate_R, dispatch.token_R, dispatch.count_E, layout, flat)
    return FusedExperts.apply(x_TD, dispatch.gate_R, dispatch.token_R, dispatch.counts, layout, *flat)


def loop_over_experts(experts: list[nn.Module], x_TD: Tensor, dispatch: Dispatch) -> Tensor:
    """The same by calling each expert: for experts whose linears are wrapped, where no grouped products run."""
    out_TD = torch.zeros_like(x_TD)
    rows = zip(dispatch.token_R.split(dispatch.counts), dispatch.gate_R.split(dispatch.counts), experts, strict=True)
    for token_n, gate_n, expert in rows:
        y_nD = expert(x_TD.index_select(0, token_n))
        out_TD = out_TD.index_add(0, token_n, (y_nD * gate_n.unsqueeze(1)).to(out_TD.dtype))
    return out_TD
