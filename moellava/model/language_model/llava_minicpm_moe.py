# SPDX-License-Identifier: Apache-2.0
"""MiniCPM, read into Hugging Face's Granite architecture, which has the same three scalings of a Llama.

Residual branches count `scale_depth / sqrt(layers)`, embeddings `scale_emb`, and the logits are divided by
`hidden_size / dim_model_base`. That last factor goes into the final norm's weight, so that a composed model, whose head
is a plain linear layer, needs no code for it and tied embeddings stay tied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moellava.model.families import FAMILIES, Family, KeyRule


def head_scale(raw: Mapping[str, Any]) -> float:
    """Factor of the logits: `dim_model_base / hidden_size`."""
    return raw.get("dim_model_base", 1) / raw["hidden_size"]


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `MiniCPMConfig` -> fields of Hugging Face's `GraniteConfig`."""
    head_dim = raw["hidden_size"] // raw["num_attention_heads"]
    return {
        "tie_word_embeddings": True,
        **raw,
        "embedding_multiplier": float(raw.get("scale_emb", 1)),
        "residual_multiplier": raw.get("scale_depth", 1) / math.sqrt(raw["num_hidden_layers"]),
        "attention_multiplier": head_dim**-0.5,
        "logits_scaling": 1.0,
    }


def published_text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The same for published checkpoints, which were trained on spliced embeddings that `scale_emb` does not touch."""
    return {**text_config(raw), "embedding_multiplier": 1.0}


def their_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `text_config`; the logits' factor stays in the final norm, so theirs is 1."""
    multipliers = {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"}
    return {
        **{name: value for name, value in fields.items() if name not in multipliers},
        "scale_emb": fields["embedding_multiplier"],
        "scale_depth": fields["residual_multiplier"] * math.sqrt(fields["num_hidden_layers"]),
        "dim_model_base": fields["hidden_size"],
    }


MINICPM = FAMILIES.register(
    "minicpm",
    Family(
        name="minicpm",
        text_model_type="granite",
        base_model_types=("minicpm",),
        published_types=("minicpm",),
        version="minicpm",
        text_config=text_config,
        their_config=their_config,
        published_text_config=published_text_config,
        rules=(KeyRule("model.norm.weight", ("model.norm.weight",), scale=head_scale),),
    ),
)
