# SPDX-License-Identifier: Apache-2.0
"""Linears in 4 or 8 bits under adapters (QLoRA, arXiv:2305.14314), through bitsandbytes.

A quantised linear here shows the world the weight that it computes with: its state dict holds that weight,
dequantised, under the plain name. So merging, gathering experts over ranks and checkpoints need to know nothing of
packed formats. It never takes a weight from a state dict: it is frozen, and follows from the folder that the stage
started from.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import nn

from moellava.adapters.factors import read_lora
from moellava.errors import UserError
from moellava.moe.adapted import Factors, understand

try:
    import bitsandbytes as bnb
except ImportError as error:
    raise UserError(
        f"Weights in 4 or 8 bits need the package bitsandbytes ({error}): pip install 'moellava[quant]'"
    ) from error


class Frozen:
    """Mixed into a linear of bitsandbytes: its state dict shows the dense weight, and loading leaves it as it is."""

    weight: Any
    bias: nn.Parameter | None

    def dense_weight(self) -> torch.Tensor:
        """[out, in], the weight that the linear computes with, in the dtype that it had before."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        # In the host's memory: dequantised all at once, the weights would not fit where they fit in 4 bits.
        destination[f"{prefix}weight"] = self.dense_weight().cpu()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(f"{prefix}weight", None)
        bias = state_dict.get(f"{prefix}bias")
        if self.bias is not None and bias is not None:
            with torch.no_grad():
                self.bias.copy_(bias)


class Linear4bit(Frozen, bnb.nn.Linear4bit):
    """Normal-float or float 4: blocks of 64 weights with a scale each."""

    def dense_weight(self) -> torch.Tensor:
        return bnb.functional.dequantize_4bit(self.weight.data, self.weight.quant_state)


def read_4bit(linear: Linear4bit) -> Factors:
    """Its weight, dequantised when it is needed. (Not of 8 bits, which treat outliers of x by themselves.)"""
    return Factors((linear.out_features, linear.in_features), linear.dense_weight, linear.bias)


understand(Linear4bit, read_4bit)
understand(lora.Linear4bit, read_lora)


class Linear8bit(Frozen, bnb.nn.Linear8bitLt):
    """LLM.int8() (arXiv:2208.07339): a scale for each row; inputs above the threshold stay in 16 bits."""

    def dense_weight(self) -> torch.Tensor:
        rows, scales = (
            (self.state.CB, self.state.SCB) if self.state.CB is not None else (self.weight.CB, self.weight.SCB)
        )
        return bnb.functional.int8_vectorwise_dequant(rows, scales).to(self.shown_as)


def quantised(linear: nn.Linear, bits: int, quant_type: str, double_quant: bool, device: torch.device) -> nn.Module:
    """A frozen copy of a linear in 4 or 8 bits on a device."""
    weight, shape = linear.weight.data, (linear.in_features, linear.out_features)
    has_bias = linear.bias is not None
    if bits == 4:
        small: Any = Linear4bit(*shape, bias=has_bias, compute_dtype=weight.dtype, device="meta")
        # Its inference layout for some CPUs wants widths that are multiples of 32, and fails on others.
        small.support_avx512bf16_for_cpu = False
        small.weight = bnb.nn.Params4bit(
            weight.clone(), requires_grad=False, quant_type=quant_type, compress_statistics=double_quant, module=small
        )
    else:
        small = Linear8bit(*shape, bias=has_bias, has_fp16_weights=False, threshold=6.0, device="meta")
        small.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
        small.shown_as = weight.dtype
    if has_bias:
        small.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    return small.to(device)


def quantise(
    model: nn.Module, names: list[str], device: torch.device, *, bits: int, quant_type: str, double_quant: bool
) -> None:
    """Replaces linears by quantised ones, in place, and tells peft about it.

    Args:
        names: of the linears: the decoder's, experts included; routers, norms, embeddings and head stay as they are.
        device: where the run will compute: moving 8-bit weights later would lose their scales.
        bits: 4 or 8.
        quant_type: 'nf4' or 'fp4', at 4 bits.
        double_quant: whether the scales are quantised too, at 4 bits.
    """
    for name in names:
        model.set_submodule(name, quantised(model.get_submodule(name), bits, quant_type, double_quant, device))
    setattr(model, f"is_loaded_in_{bits}bit", True)


def round_trip(model: nn.Module, names: list[str], *, bits: int, quant_type: str, double_quant: bool) -> None:
    """Rounds linears to what `quantise` would compute with, and leaves them dense."""
    for name in names:
        linear = model.get_submodule(name)
        small: Any = quantised(linear, bits, quant_type, double_quant, linear.weight.device)
        linear.weight.data = small.dense_weight()
