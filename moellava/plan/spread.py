# SPDX-License-Identifier: Apache-2.0
"""Sparse layers as one of several processes holds them, for tracing: its own experts, and the rows that travel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moellava.errors import UserError
from moellava.moe import moe_layers
from moellava.moe.experts import Dispatch, run_experts, sort_by_expert
from moellava.moe.layer import NativeMoE
from moellava.moe.router import Routing
from moellava.plan.counting import even_counts


class Travel(torch.autograd.Function):
    """An exchange of rows at an even load: as many arrive as were sent, in memory of their own."""

    @staticmethod
    def forward(ctx: Any, row_RD: Tensor) -> Tensor:
        return torch.empty_like(row_RD)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> Tensor:
        return torch.empty_like(grad_RD)


class SpreadMoE(NativeMoE):
    """The steps of `DeepSpeedMoE` at ep_size > 1, without the other processes. `experts` holds this process's own."""

    def run(self, x_TD: Tensor, routing: Routing) -> Tensor:
        dispatch = sort_by_expert(routing.choice, routing.gate_Nk, self.n_experts)
        experts = list(self.experts)
        row_QD = Travel.apply(x_TD.index_select(0, dispatch.token_R))
        every_Q = torch.arange(len(row_QD), device=x_TD.device)
        count_E = even_counts(every_Q.new_zeros(len(experts)), len(every_Q))
        arrived = Dispatch(every_Q, torch.ones_like(dispatch.gate_R), count_E)
        back_RD = Travel.apply(run_experts(experts, row_QD, arrived, self.context.kernel))
        weighted_RD = (back_RD * dispatch.gate_R.unsqueeze(1)).to(x_TD.dtype)
        return torch.zeros_like(x_TD).index_add(0, dispatch.token_R, weighted_RD)


def spread(model: nn.Module, ep_size: int) -> None:
    """Leaves a native sparse model with the experts of one of `ep_size` processes. Raises UserError if they cannot be
    dealt out evenly."""
    if ep_size == 1:
        return
    for _, layer in moe_layers(model):
        assert isinstance(layer, NativeMoE)
        if layer.n_experts % ep_size:
            raise UserError(f"--ep_size {ep_size} does not divide --num_experts {layer.n_experts}.")
        layer.experts = nn.ModuleList(layer.experts[: layer.n_experts // ep_size])
        layer.__class__ = SpreadMoE
