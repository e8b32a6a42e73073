# SPDX-License-Identifier: Apache-2.0
"""StableLM-2. Its first configs, `stablelm_epoch` and those inside published checkpoints, use other field names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moellava.model.families import FAMILIES, Family

EPOCH_FIELDS = {"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"}


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `StableLMEpochConfig` -> fields of Hugging Face's `StableLmConfig`."""
    return {EPOCH_FIELDS.get(name, name): value for name, value in raw.items()}


def their_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `text_config`."""
    old_names = {new: old for old, new in EPOCH_FIELDS.items()}
    return {old_names.get(name, name): value for name, value in fields.items()}


STABLELM = FAMILIES.register(
    "stablelm",
    Family(
        name="stablelm",
        text_model_type="stablelm",
        base_model_types=("stablelm", "stablelm_epoch"),
        published_types=("stablelm",),
        version="stablelm",
        text_config=text_config,
        their_config=their_config,
    ),
)
