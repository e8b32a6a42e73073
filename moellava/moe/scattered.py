# SPDX-License-Identifier: Apache-2.0
"""Experts by the package ScatterMoE (arXiv:2403.08245, github.com/shawntan/scattermoe 0.3.0), written in Triton.

Legend: T tokens, D hidden, R routed rows sorted by expert, E experts, I intermediate units, X rows that a product is
given.

Its product reads each row's token where it is, and writes each result where its token's are: no rows are copied before
the first product, or added up one by one after the last. That takes a row for each choice of each token. Where some
have none (padding, rows of other ranks), rows are gathered and added as in `grouped.py`. Weights are read where they
lie, and products run in fp32 and fp16 too.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from moellava.moe.kernels import Dispatch
from moellava.moe.places import Stacked
from moellava.moe.weights import TENSORS, Layout

PACKAGE = "scattermoe"

INTERPRETER = "TRITON_INTERPRET"
"""Where this variable is 1, Triton runs kernels on the CPU, step by step, to try them."""

REPLACED = {
    "transformers.models.gpt_oss.modeling_gpt_oss": "GptOssExperts",
    "transformers.models.granitemoehybrid.modeling_granitemoehybrid": "GraniteMoeHybridMoE",
}
"""Module -> class of transformers whose forward the package replaces by its own when it is imported."""


def why_not_scattered(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the package cannot run there with products of that dtype, or None."""
    if dtype == torch.float64:
        return "it sums in float32"
    if device.type == "cuda":
        return None
    if os.environ.get(INTERPRETER) != "1":
        return f"Triton's kernels need a GPU, or {INTERPRETER}=1 in the environment, which tries them on a CPU, slowly"
    return "Triton's interpreter multiplies bfloat16 wrongly" if dtype == torch.bfloat16 else None


def run_scattered(x_TD: Tensor, dispatch: Dispatch, layout: Layout, flat: list[Tensor | None]) -> Tensor:
    """As `run_grouped`: the gate meets the units, sums are in fp32."""
    parallel_linear = _package().parallel_linear
    experts, token_R, gate_R1 = layout.experts(flat), dispatch.token_R, dispatch.gate_R.unsqueeze(1)
    every_E, ends_E = torch.arange(len(experts), device=x_TD.device), dispatch.count_E.cumsum(0)
    expert_R = every_E.repeat_interleave(dispatch.count_E, output_size=len(token_R))
    gathers = dispatch.order_R is None
    order_R = torch.arange(len(token_R), device=x_TD.device) if gathers else dispatch.order_R
    row_XD = x_TD.index_select(0, token_R) if gathers else x_TD

    def stacked(name: str) -> Tensor | None:
        tensors = [getattr(expert, name) for expert in experts]
        return None if tensors[0] is None else Stacked.apply(*tensors)

    def product(row_XD: Tensor, weight_EID: Tensor, bias_EI: Tensor | None, is_sorted: bool, sorts: bool) -> Tensor:
        fan_out = len(token_R) // max(len(row_XD), 1)
        indices, ways = (expert_R, order_R, ends_E), {"grouped_in": is_sorted, "grouped_out": sorts}
        return parallel_linear(row_XD, weight_EID.transpose(1, 2), fan_out, *indices, expert_biases=bias_EI, **ways)

    def inward(role: str) -> Tensor:
        weight, bias = (stacked(name) for name in TENSORS[role])
        return product(row_XD, weight, bias, is_sorted=gathers, sorts=True)

    if "w13_PD" in layout.names:
        h1_RI, h3_RI = inward("w13").chunk(2, dim=1)
        inner_RI = layout.activation(h1_RI) * h3_RI
    else:
        inner_RI = layout.activation(inward("w1"))
        if layout.is_gated:
            inner_RI = inner_RI * inward("w3")
    weight_EDI, bias_ED = (stacked(name) for name in TENSORS["w2"])
    y_RD = product((inner_RI * gate_R1).to(x_TD.dtype), weight_EDI, None, is_sorted=True, sorts=gathers)
    if gathers:
        out_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device).index_add(0, token_R, y_RD.float())
    else:
        out_TD = y_RD.view(len(x_TD), -1, x_TD.shape[1]).sum(1, dtype=torch.float32)
    if bias_ED is not None:
        out_TD = out_TD.index_add(0, token_R, (gate_R1 * bias_ED[expert_R]).float())
    return out_TD.to(x_TD.dtype)


def _package() -> Any:
    """The package, with transformers as it was, and with TF32 where torch's own products have it."""
    package = sys.modules.get(PACKAGE) or _imported()
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # torch 2.9
    package.kernels.ops.ALLOW_TF32 = matmul.allow_tf32 if precision is None else precision == "tf32"
    return package


def _imported() -> Any:
    classes = [getattr(import_module(module), name, None) for module, name in REPLACED.items()]
    own = [(one, one.forward) for one in classes if one is not None]
    package = import_module(PACKAGE)
    for one, forward in own:
        one.forward = forward
    return package
