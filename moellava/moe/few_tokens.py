# SPDX-License-Identifier: Apache-2.0
"""Experts over the few tokens of a decoding step, without gradient: what costs time there is not the matrix products
but how many operations surround them.

Legend: T tokens, D hidden, k choices, R = T × k routed rows sorted by expert, n the rows of one expert.

`FusedExperts` prepares memory for all rows and cuts them into blocks, which pays from some hundred rows on. Here an
expert's rows go through its linears and that is all; experts that no token chose are not touched.
"""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moellava.moe.mlp import MLPLayout
from moellava.moe.weights import is_called_plainly, plain_layout

FEW = 64
"""Tokens up to which a forward is a step of decoding: fewer answers grow at once, and prompts are longer."""


def run_few(experts: list[nn.Module], x_TD: Tensor, expert_Tk: Tensor, gate_Tk: Tensor) -> Tensor:
    """Σ over a token's experts of gate × expert(token), [T, D], summed in the gates' fp32.

    Args:
        experts: all of them, in order.
        x_TD: tokens on the CPU, where reading the choices waits for nothing.
        expert_Tk, gate_Tk: the experts of each token, and how much each counts.
    """
    layout = plain_layout(experts[0])
    if len(x_TD) == 1:
        y_kD = torch.cat([_run(experts[index], layout, x_TD) for index in expert_Tk[0].tolist()])
        return torch.mm(gate_Tk, y_kD.to(gate_Tk.dtype)).to(x_TD.dtype)
    sorted_R, order_R = expert_Tk.flatten().sort(stable=True)
    token_R = order_R // expert_Tk.shape[1]
    chosen = [(index, len(list(rows))) for index, rows in groupby(sorted_R.tolist())]
    parts = x_TD.index_select(0, token_R).split([count for _, count in chosen])
    y_RD = torch.cat([_run(experts[index], layout, x_nD) for (index, _), x_nD in zip(chosen, parts, strict=True)])
    y_RD = y_RD * gate_Tk.flatten()[order_R].unsqueeze(1)
    return y_RD.new_zeros(x_TD.shape).index_add_(0, token_R, y_RD).to(x_TD.dtype)


def _run(expert: nn.Module, layout: MLPLayout | None, x_nD: Tensor) -> Tensor:
    """An expert's output: by its tensors, or by calling it where that does more (adapters, hooks, 4 bits)."""
    if layout is None:
        return expert(x_nD)
    linears = {role: expert._modules[name] for role, name in layout.linears.items()}
    if not is_called_plainly(expert, linears.values()):
        return expert(x_nD)
    activation = getattr(expert, layout.activation)
    if "w13" in linears:
        h1_nI, h3_nI = _linear(linears["w13"], x_nD).chunk(2, dim=1)
        inner_nI = activation(h1_nI) * h3_nI
    else:
        inner_nI = activation(_linear(linears["w1"], x_nD))
        if "w3" in linears:
            inner_nI = inner_nI * _linear(linears["w3"], x_nD)
    return _linear(linears["w2"], inner_nI)


def _linear(linear: nn.Module, x_nD: Tensor) -> Tensor:
    """As calling it; what surrounds a call takes longer than one row's product."""
    tensors = linear._parameters
    return F.linear(x_nD, tensors["weight"], tensors["bias"])
