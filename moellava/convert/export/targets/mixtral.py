# SPDX-License-Identifier: Apache-2.0
"""Mixtral (arXiv:2401.04088), for engines that know no other: every layer is sparse"""

from __future__ import annotations

from typing import Any

from moellava.convert.export.pieces import Pieces
from moellava.convert.export.source import Layer, Source
from moellava.convert.export.targets.granite_moe import granite_fields
from moellava.convert.export.targets.target import TARGETS, Target, everywhere, routed, window_of


def mixtral_mlp(source: Source, layer: Layer) -> Pieces:
    """Under the names of its first release."""
    names = ("w1", "w3", "w2")
    return routed(layer, "block_sparse_moe.gate.weight", "block_sparse_moe.experts.{}", names)


def mixtral_fields(source: Source) -> dict[str, Any]:
    """Fields of Mixtral's routing, and the window of its attention."""
    return {**granite_fields(source), "sliding_window": window_of(source)}


TARGETS.register(
    "mixtral",
    Target(
        text_type="mixtral",
        decoders=("llama", "mistral"),
        place=everywhere,
        fields=mixtral_fields,
        mlp=mixtral_mlp,
    ),
)
