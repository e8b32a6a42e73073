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
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from moellava.moe.kernels import Dispatch
from moellava.moe.places import Stacked
from moellava.moe.weights import TENSORS, Expert, Layout

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
    if "expert_biases" not in signature(_package().parallel_linear).parameters:
        return "it is older than release 0.3.0, whose functions are called here"
    if dtype == torch.float64:
        return "it sums in float32"
    if device.type == "cuda":
        return None
    if os.environ.get(INTERPRETER) != "1":
        return f"Triton's kernels need a GPU, or {INTERPRETER}=1 in the environment, which tries them on a CPU, slowly"
    return "Triton's interpreter multiplies bfloat16 wrongly" if dtype == torch.bfloat16 else None


def run_scattered(x_TD: Tensor, dispatch: Dispatch, layout: Layout, flat: list[Tensor | None]) -> Tensor:
    """As `run_grouped`: the gate meets the units, sums are in fp32."""
    products, gate_R1 = Products(x_TD, dispatch, layout.experts(flat)), dispatch.gate_R.unsqueeze(1)
    if "w13_PD" in layout.names:
        h1_RI, h3_RI = products.inward("w13").chunk(2, dim=1)
        inner_RI = layout.activation(h1_RI) * h3_RI
    else:
        inner_RI = layout.activation(products.inward("w1"))
        if layout.is_gated:
            inner_RI = inner_RI * products.inward("w3")
    return products.outward((inner_RI * gate_R1).to(x_TD.dtype), gate_R1).to(x_TD.dtype)


class Products:
    """The package's products of a layer's rows.

    Args:
        x_TD, dispatch: tokens and their rows.
        experts: their tensors.
    """

    def __init__(self, x_TD: Tensor, dispatch: Dispatch, experts: list[Expert]):
        self.experts, self.token_R, self.shape = experts, dispatch.token_R, x_TD.shape
        rows, every_E = len(dispatch.token_R), torch.arange(len(experts), device=x_TD.device)
        self.expert_R = every_E.repeat_interleave(dispatch.count_E, output_size=rows)
        self.end_E = dispatch.count_E.cumsum(0)
        self.gathers = dispatch.order_R is None
        self.order_R = torch.arange(rows, device=x_TD.device) if self.gathers else dispatch.order_R
        self.row_XD = x_TD.index_select(0, dispatch.token_R) if self.gathers else x_TD
        self.fan_out = rows // max(len(self.row_XD), 1)
        self.linear = _package().parallel_linear

    def inward(self, role: str) -> Tensor:
        """A linear of the tokens, [R, I]."""
        weight, bias = TENSORS[role]
        return self._product(self.row_XD, weight, bias, self.fan_out, grouped_in=self.gathers, grouped_out=True)

    def outward(self, inner_RI: Tensor, gate_R1: Tensor) -> Tensor:
        """Σ over a token's rows of what w2 makes of units that the gate has met, and of gate × bias, [T, D] in fp32."""
        y_RD = self._product(inner_RI, "w2_DI", None, 1, grouped_in=True, grouped_out=self.gathers)
        if self.gathers:
            out_TD = y_RD.new_zeros(self.shape, dtype=torch.float32).index_add(0, self.token_R, y_RD.float())
        else:
            out_TD = y_RD.view(self.shape[0], self.fan_out, self.shape[1]).sum(1, dtype=torch.float32)
        bias_ED = self._stacked("b2_D")
        if bias_ED is None:
            return out_TD
        return out_TD.index_add(0, self.token_R, (gate_R1 * bias_ED[self.expert_R]).float())

    def _product(self, row_XD: Tensor, weight: str, bias: str | None, fan_out: int, **ways: bool) -> Tensor:
        """The package's name for rows that are sorted by expert is grouped."""
        weight_EID = self._stacked(weight)
        assert weight_EID is not None
        indices = (self.expert_R, self.order_R, self.end_E)
        bias_EI = None if bias is None else self._stacked(bias)
        return self.linear(row_XD, weight_EID.transpose(1, 2), fan_out, *indices, expert_biases=bias_EI, **ways)

    def _stacked(self, name: str) -> Tensor | None:
        tensors = [getattr(expert, name) for expert in self.experts]
        return None if tensors[0] is None else Stacked.apply(*tensors)


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
