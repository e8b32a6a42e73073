# SPDX-License-Identifier: Apache-2.0
"""Qwen2-MoE (arXiv:2407.10671, section 2.2.2): one shared expert, counted by a gate"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moellava.convert.export.pieces import Piece, Pieces, zeros
from moellava.convert.export.source import Layer, Source
from moellava.convert.export.targets.target import (
    TARGETS,
    Target,
    anywhere,
    copied,
    dtype_of,
    n_experts,
    routed,
    silent,
    unchanged,
    window_of,
)

NO_SHARED = 8
"""Width of a shared expert that adds nothing. Of width 0 engines do not load it."""


def double(tensor: Tensor) -> Tensor:
    """Twice the tensor, to the bit."""
    return tensor * 2


def qwen2_mlp(source: Source, layer: Layer) -> Pieces:
    """A shared expert is gated by sigmoid(0) = ½, and counts twice for it."""
    if not layer.n_experts:
        return unchanged(layer)
    own, shared = f"{layer.prefix}{layer.mlp}.shared", "mlp.shared_expert"
    pieces = routed(layer, "mlp.gate.weight", "mlp.experts.{}")
    pieces["mlp.shared_expert_gate.weight"] = zeros((1, source.text.hidden_size), dtype_of(source, layer))
    if not source.has_shared:
        return pieces | silent(source, layer, shared, NO_SHARED)
    return pieces | copied(shared, own) | {f"{shared}.down_proj.weight": Piece((f"{own}.down_proj.weight",), double)}


def qwen2_attention(source: Source, layer: Layer) -> Pieces:
    """It has biases on queries, keys and values; what comes without gets zeros."""
    pieces = {}
    for linear in ("q_proj", "k_proj", "v_proj"):
        if f"self_attn.{linear}.bias" not in layer.names:
            weight = source.tensors[f"{layer.prefix}self_attn.{linear}.weight"]
            pieces[f"self_attn.{linear}.bias"] = zeros((weight.shape[0],), weight.dtype)
    return pieces


def qwen_fields(source: Source) -> dict[str, Any]:
    """Fields of the routing of Qwen's."""
    spec = source.spec
    assert spec is not None
    return {
        "num_experts": n_experts(source),
        "num_experts_per_tok": spec.top_k_experts,
        "norm_topk_prob": spec.top_k_experts > 1 or spec.top1_gate == "exact",
        "moe_intermediate_size": source.width,
        "router_aux_loss_coef": spec.router_aux_loss_coef,
    }


def qwen2_fields(source: Source) -> dict[str, Any]:
    """The same, and the window of Mistral's attention in Qwen2's words."""
    text = source.text
    shared = text.intermediate_size if source.has_shared else NO_SHARED
    fields = {**qwen_fields(source), "shared_expert_intermediate_size": shared, "qkv_bias": True}
    window = window_of(source)
    if window is not None:
        layers = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
        fields |= {"use_sliding_window": True, "sliding_window": window, "layer_types": layers}
    else:
        fields |= {"use_sliding_window": False, "layer_types": ["full_attention"] * text.num_hidden_layers}
    return fields


TARGETS.register(
    "qwen2-moe",
    Target(
        text_type="qwen2_moe",
        decoders=("llama", "mistral", "qwen2"),
        place=anywhere,
        fields=qwen2_fields,
        mlp=qwen2_mlp,
        attention=qwen2_attention,
        gates=("exact", "probability"),
        holds_shared=True,
    ),
)
