# SPDX-License-Identifier: Apache-2.0
"""Qwen-1, read into Hugging Face's Qwen2 architecture: the same mathematics under other names.

`c_attn` is the query, key and value projections joined; the MLP is `c_proj(w1(x) * silu(w2(x)))` with half of
`intermediate_size` (Qwen's config counts both halves). Dynamic NTK and log-n attention act only beyond `seq_length`
and are not carried over: `max_position_embeddings` is `seq_length`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moellava.model.families import FAMILIES, Family, KeyRule

RULES = (
    KeyRule("transformer.wte.weight", ("model.embed_tokens.weight",)),
    KeyRule("transformer.h.*.ln_1.weight", ("model.layers.*.input_layernorm.weight",)),
    KeyRule("transformer.h.*.ln_2.weight", ("model.layers.*.post_attention_layernorm.weight",)),
    KeyRule("transformer.h.*.attn.c_attn.*", tuple(f"model.layers.*.self_attn.{name}_proj.*" for name in "qkv")),
    KeyRule("transformer.h.*.attn.c_proj.weight", ("model.layers.*.self_attn.o_proj.weight",)),
    KeyRule("transformer.h.*.mlp.w2.weight", ("model.layers.*.mlp.gate_proj.weight",)),
    KeyRule("transformer.h.*.mlp.w1.weight", ("model.layers.*.mlp.up_proj.weight",)),
    KeyRule("transformer.h.*.mlp.c_proj.weight", ("model.layers.*.mlp.down_proj.weight",)),
    KeyRule("transformer.ln_f.weight", ("model.norm.weight",)),
)


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `QWenConfig` -> fields of Hugging Face's `Qwen2Config`."""
    return {
        **raw,
        "intermediate_size": raw["intermediate_size"] // 2,
        "num_key_value_heads": raw["num_attention_heads"],
        "rms_norm_eps": raw["layer_norm_epsilon"],
        "rope_theta": float(raw.get("rotary_emb_base", 10000)),
        "max_position_embeddings": raw.get("seq_length", raw.get("max_position_embeddings", 8192)),
        "hidden_act": "silu",
        "use_sliding_window": False,
    }


def their_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `text_config`."""
    renamed = {"intermediate_size", "num_key_value_heads", "rms_norm_eps", "rope_theta", "hidden_act"}
    return {
        **{name: value for name, value in fields.items() if name not in renamed},
        "intermediate_size": 2 * fields["intermediate_size"],
        "layer_norm_epsilon": fields["rms_norm_eps"],
        "rotary_emb_base": fields["rope_theta"],
        "rotary_pct": 1.0,
        "seq_length": fields["max_position_embeddings"],
        "kv_channels": fields["hidden_size"] // fields["num_attention_heads"],
        "no_bias": True,
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
        "use_flash_attn": False,
    }


QWEN = FAMILIES.register(
    "qwen",
    Family(
        name="qwen",
        text_model_type="qwen2",
        base_model_types=("qwen",),
        published_types=("qwen",),
        version="qwen",
        text_config=text_config,
        their_config=their_config,
        layers="transformer.h",
        rules=RULES,
        marks=("layer_norm_epsilon", "kv_channels"),
    ),
)
