# SPDX-License-Identifier: Apache-2.0
"""Granite-MoE, for MiniCPM, which is read into Granite: every layer is sparse"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from moellava.convert.export.pieces import Piece, Pieces, zeros
from moellava.convert.export.source import Layer, Source
from moellava.convert.export.targets.target import (
    TARGETS,
    Place,
    Target,
    dtype_of,
    expert_names,
    n_experts,
    replicated,
    stacked,
    stacked_pairs,
)


def granite_mlp(source: Source, layer: Layer, with_shared: bool = False) -> Pieces:
    """All experts in two tensors. A dense layer's MLP is each of its experts; with shared experts, it is the shared
    one, and its experts add nothing."""
    own, count, dtype = f"{layer.prefix}{layer.mlp}.", n_experts(source), dtype_of(source, layer)
    inner, hidden = source.width, source.text.hidden_size
    names = partial(expert_names, layer, count)
    router = zeros((count, hidden), dtype)
    pieces = {
        "block_sparse_moe.router.layer.weight": Piece((f"{own}router.weight",)) if layer.n_experts else router,
        "block_sparse_moe.input_linear.weight": Piece(names("gate_proj", "up_proj"), stacked_pairs),
        "block_sparse_moe.output_linear.weight": Piece(names("down_proj"), stacked),
    }
    if with_shared:
        shared = f"{own}shared." if layer.n_experts else own
        pair = (f"{shared}gate_proj.weight", f"{shared}up_proj.weight")
        pieces["shared_mlp.input_linear.weight"] = Piece(pair, lambda *both: torch.cat(both))
        pieces["shared_mlp.output_linear.weight"] = Piece((f"{shared}down_proj.weight",))
        if not layer.n_experts:
            pieces["block_sparse_moe.output_linear.weight"] = zeros((count, hidden, inner), dtype)
    return pieces


def granite_fields(source: Source) -> dict[str, Any]:
    """Fields of Granite's routing; an expert's width is `intermediate_size`."""
    spec = source.spec
    assert spec is not None
    return {
        "num_local_experts": n_experts(source),
        "num_experts_per_tok": spec.top_k_experts,
        "intermediate_size": source.width,
        "router_aux_loss_coef": spec.router_aux_loss_coef,
    }


def granite_shared_fields(source: Source) -> dict[str, Any]:
    """The same, and the shared expert's width."""
    return {**granite_fields(source), "shared_intermediate_size": source.text.intermediate_size}


def only_shared(source: Source) -> Place:
    """As `replicated`, for models with shared experts."""
    return replicated(source) if source.has_shared else None


TARGETS.register(
    "granite-moe",
    Target(
        text_type="granitemoe",
        decoders=("granite",),
        experts="block_sparse_moe.experts",
        place=replicated,
        fields=granite_fields,
        mlp=granite_mlp,
        copies_dense=True,
    ),
)
TARGETS.register(
    "granite-moe-shared",
    Target(
        text_type="granitemoeshared",
        decoders=("granite",),
        experts="block_sparse_moe.experts",
        place=only_shared,
        fields=granite_shared_fields,
        mlp=partial(granite_mlp, with_shared=True),
        holds_shared=True,
    ),
)
