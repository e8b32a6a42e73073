# SPDX-License-Identifier: Apache-2.0
"""Qwen3-MoE (arXiv:2505.09388) and the same within Qwen3-VL: queries and keys are normalised, no shared expert"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from moellava.convert.export.pieces import Piece, Pieces
from moellava.convert.export.source import Layer, Source
from moellava.convert.export.targets.qwen2_moe import qwen_fields
from moellava.convert.export.targets.target import (
    TARGETS,
    Target,
    anywhere,
    expert_names,
    routed,
    stacked,
    stacked_pairs,
    unchanged,
)


def qwen3_mlp(source: Source, layer: Layer) -> Pieces:
    """Under Qwen2-MoE's names."""
    return routed(layer, "mlp.gate.weight", "mlp.experts.{}") if layer.n_experts else unchanged(layer)


TARGETS.register(
    "qwen3-moe",
    Target(
        text_type="qwen3_moe",
        decoders=("qwen3",),
        place=anywhere,
        fields=qwen_fields,
        mlp=qwen3_mlp,
        gates=("exact", "probability"),
    ),
)


def transposed(stack: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same with its last two dimensions exchanged."""
    return lambda *tensors: stack(*tensors).transpose(1, 2).contiguous()


def qwen3_vl_mlp(source: Source, layer: Layer) -> Pieces:
    """All experts in two tensors, [E, D, 2 I] and [E, I, D], as on the hub."""
    if not layer.n_experts:
        return unchanged(layer)
    names = partial(expert_names, layer, layer.n_experts)
    return {
        "mlp.gate.weight": Piece((f"{layer.prefix}{layer.mlp}.router.weight",)),
        "mlp.experts.gate_up_proj": Piece(names("gate_proj", "up_proj"), transposed(stacked_pairs)),
        "mlp.experts.down_proj": Piece(names("down_proj"), transposed(stacked)),
    }


TARGETS.register(
    "qwen3-vl-moe",
    Target(
        text_type="qwen3_vl_moe_text",
        decoders=("qwen3_vl_text",),
        place=anywhere,
        fields=qwen_fields,
        mlp=qwen3_vl_mlp,
        vlm_type="qwen3_vl_moe",
    ),
)
