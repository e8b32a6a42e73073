# SPDX-License-Identifier: Apache-2.0
"""Linears in 4 and 8 bits, for tracing: the bytes that bitsandbytes packs them into, and their weight as it is for a
moment in each product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moellava.moe.adapted import Factors, understand
from moellava.train.memory import FP32_BYTES

BLOCK, SCALES = 64, 256
"""Numbers that share a scale in 4 bits, and scales that share one of their own (`--double_quant`)."""


class PackedLinear(nn.Module):
    """A frozen linear in 4 or 8 bits.

    Args:
        linear: whose place it takes.
        bits: of a number.
        double_quant: whether the scales of 4 bits are in 8 bits themselves.
    """

    def __init__(self, linear: nn.Linear, bits: int, double_quant: bool):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.bits, self.dtype, self.bias = bits, linear.weight.dtype, linear.bias
        count = linear.weight.numel()
        scales = FP32_BYTES * self.out_features
        if bits == 4:
            blocks = -(-count // BLOCK)
            scales = blocks + FP32_BYTES * -(-blocks // SCALES) if double_quant else FP32_BYTES * blocks
        packed = torch.empty(count * bits // 8 + scales, dtype=torch.uint8, device=linear.weight.device)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def dense_weight(self) -> Tensor:
        """[out, in], in memory of its own."""
        shape = (self.out_features, self.in_features)
        return torch.empty(shape, dtype=self.dtype, device=self.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return PackedProduct.apply(x, self)


class PackedProduct(torch.autograd.Function):
    """A product with a weight that is unpacked for it, forward and backward, and not kept in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: PackedLinear) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.dense_weight().to(x.dtype), linear.bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        return dout @ ctx.linear.dense_weight().to(dout.dtype), None


def read_packed(linear: PackedLinear) -> Factors | None:
    """As training does: of 4 bits the weight when it is needed; None of 8, which treat outliers of x by themselves."""
    shape = (linear.out_features, linear.in_features)
    return Factors(shape, linear.dense_weight, linear.bias) if linear.bits == 4 else None


understand(PackedLinear, read_packed)


def pack(model: nn.Module, names: list[str], bits: int, double_quant: bool) -> None:
    """Packs linears in place, with adapters around them or without.

    Args:
        names: of the linears, or of what adapters have put around them.
        bits, double_quant: see `PackedLinear`.
    """
    for name in names:
        found: Any = model.get_submodule(name)
        if hasattr(found, "base_layer"):
            found.base_layer = PackedLinear(found.base_layer, bits, double_quant)
        else:
            model.set_submodule(name, PackedLinear(found, bits, double_quant))
