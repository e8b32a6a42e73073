# SPDX-License-Identifier: Apache-2.0
"""Ernie 4.5 MoE: a bias takes part in choosing experts, rotary positions are interleaved"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moellava.convert.export.pieces import Piece, Pieces, zeros
from moellava.convert.export.source import Layer, Source
from moellava.convert.export.targets.target import (
    LINEARS,
    TARGETS,
    Target,
    copied,
    dtype_of,
    in_steps,
    n_experts,
    routed,
    silent,
    unchanged,
)

ABSENT = -1e4
"""Bias of an expert that does not exist: no probability makes up for it."""


def interleaved(heads: int) -> Callable[[Tensor], Tensor]:
    """Rows of a projection to queries or keys, [H · d, …], so that Ernie's rotary positions, which turn neighbouring
    units, turn what Llama's turn: units i and i + d / 2 of a head become 2 i and 2 i + 1."""

    def make(tensor: Tensor) -> Tensor:
        halves = tensor.unflatten(0, (heads, 2, -1))
        return halves.transpose(1, 2).reshape(tensor.shape).contiguous()

    return make


def has_biases(source: Source) -> bool:
    """Whether its queries, keys and values have biases."""
    return any(name.endswith("q_proj.bias") for name in source.layers[0].names)


def ernie_attention(source: Source, layer: Layer) -> Pieces:
    """Queries and keys in Ernie's order; where they have biases, all linears of Ernie do."""
    text, pieces = source.text, {}
    for linear, heads in (("q_proj", text.num_attention_heads), ("k_proj", text.num_key_value_heads)):
        for part in ("weight", "bias"):
            name = f"self_attn.{linear}.{part}"
            if name in layer.names:
                pieces[name] = Piece((layer.prefix + name,), interleaved(heads))
    if has_biases(source):
        pieces["self_attn.o_proj.bias"] = zeros((text.hidden_size,), dtype_of(source, layer))
    return pieces


def ernie_mlp(source: Source, layer: Layer) -> Pieces:
    """Layers with fewer experts than others have more that do nothing and are never chosen."""
    hidden, dtype = source.text.hidden_size, dtype_of(source, layer)
    own, pieces = f"{layer.prefix}{layer.mlp}.", unchanged(layer)
    if layer.n_experts:
        count, more = n_experts(source), n_experts(source) - layer.n_experts
        pieces = routed(layer, "mlp.gate.weight", "mlp.experts.{}")
        pieces["mlp.gate.weight"] = Piece((f"{own}router.weight",), partial(_with_rows, more=more))
        for expert in range(layer.n_experts, count):
            pieces |= silent(source, layer, f"mlp.experts.{expert}", source.width)
        given = (f"{own}router.bias",) if "mlp.router.bias" in layer.names else ()
        pieces["mlp.moe_statics.e_score_correction_bias"] = Piece(
            given, partial(_biases, count=layer.n_experts, more=more)
        )
        if source.has_shared:
            pieces |= copied("mlp.shared_experts", f"{own}shared")
    biased = "mlp.shared_experts" if layer.n_experts else "mlp"
    if has_biases(source) and (source.has_shared or not layer.n_experts):
        for linear, size in zip(LINEARS, (source.text.intermediate_size,) * 2 + (hidden,), strict=True):
            pieces[f"{biased}.{linear}.bias"] = zeros((size,), dtype)
    return pieces


def _with_rows(router: Tensor, more: int) -> Tensor:
    """[E, D] -> [E + more, D], with zeros."""
    return torch.cat([router, router.new_zeros(more, router.shape[1])])


def _biases(*given: Tensor, count: int, more: int) -> Tensor:
    """[1, E + more]: the router's own biases, or zeros, and those of experts that do not exist."""
    own = given[0].float() if given else torch.zeros(count)
    return torch.cat([own, torch.full((more,), ABSENT, device=own.device)]).unsqueeze(0)


def ernie_fields(source: Source) -> dict[str, Any]:
    """Fields of Ernie's routing."""
    spec = source.spec
    assert spec is not None
    return {
        "moe_num_experts": n_experts(source),
        "moe_k": spec.top_k_experts,
        "moe_intermediate_size": source.width,
        "moe_num_shared_experts": int(source.has_shared),
        "use_bias": has_biases(source),
        "router_aux_loss_coef": spec.router_aux_loss_coef,
    }


TARGETS.register(
    "ernie-moe",
    Target(
        text_type="ernie4_5_moe",
        decoders=("llama", "mistral", "qwen2"),
        place=in_steps,
        fields=ernie_fields,
        mlp=ernie_mlp,
        attention=ernie_attention,
        holds_shared=True,
        holds_bias=True,
        holds_counts=True,
        holds_window=False,
    ),
)
