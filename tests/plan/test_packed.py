# SPDX-License-Identifier: Apache-2.0
"""What linears in 4 and 8 bits take, as bitsandbytes packs them and as they are planned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from moellava.adapters.quantize import quantised
from moellava.moe.adapted import factors_of
from moellava.plan.packed import PackedLinear, pack


def bytes_of(linear: Any) -> int:
    """A quantised linear's, with its scales."""
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        return linear.weight.CB.nbytes + linear.weight.SCB.nbytes
    scales = [state.absmax, *([state.state2.absmax] if state.nested else [])]
    return linear.weight.nbytes + sum(one.nbytes for one in scales)


@pytest.mark.parametrize(("bits", "double_quant"), [(4, True), (4, False), (8, False)])
def test_a_packed_linear_has_the_bytes_of_a_real_one(bits, double_quant):
    linear = nn.Linear(768, 640, bias=False, dtype=torch.bfloat16)
    real = quantised(linear, bits, "nf4", double_quant, torch.device("cpu"))
    assert PackedLinear(linear, bits, double_quant).weight.nbytes == pytest.approx(bytes_of(real), rel=1e-3)


def test_a_product_has_a_gradient_and_keeps_no_weight():
    packed = PackedLinear(nn.Linear(32, 8), 4, True)
    x = torch.ones(3, 32, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = packed(x)
    out.sum().backward()
    assert out.shape == (3, 8) and x.grad.shape == x.shape and kept == []


def test_what_adapters_have_put_around_a_linear_stays():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(4, 4)

    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "adapted": Adapted(), "other": nn.Linear(4, 4)})
    pack(model, ["plain", "adapted"], 8, False)
    found = [type(part) for part in (model["plain"], model["adapted"], model["adapted"].base_layer, model["other"])]
    assert found == [PackedLinear, Adapted, PackedLinear, nn.Linear]


@pytest.mark.parametrize(("bits", "joins"), [(4, True), (8, False)])
def test_experts_in_4_bits_may_run_as_grouped_products(bits, joins):
    factors = factors_of(PackedLinear(nn.Linear(16, 8), bits, True))
    assert (factors is not None) == joins
