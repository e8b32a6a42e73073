# SPDX-License-Identifier: Apache-2.0
"""What adapted linears compute, for those who run many of them as one (`moellava.moe.adapted`)."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from moellava.moe.adapted import Factors, factors_of


def read_lora(layer: Any) -> Factors | None:
    """A and B of one of peft's LoRA layers beside the linear in it; None where it does more: several adapters, DoRA
    and its like, a bias of B, an embedding's or a transposed weight."""
    base = factors_of(layer.get_base_layer())
    if base is None or layer.disable_adapters or layer.merged:
        return base
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return base
    name, matrices = names[0], [*layer.lora_A.values(), *layer.lora_B.values()]
    if len(names) > 1 or name in layer.lora_variant or getattr(layer, "fan_in_fan_out", False):
        return None
    if any(type(matrix) is not nn.Linear or matrix.bias is not None for matrix in matrices):
        return None
    dropout = getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    return dataclasses.replace(base, down_rD=down, up_Ir=up, scale=layer.scaling[name], dropout=dropout)
