# SPDX-License-Identifier: Apache-2.0
"""Llama, Vicuna, SmolLM2: Hugging Face's own names throughout."""

from __future__ import annotations

from moellava.model.families import FAMILIES, Family

LLAMA = FAMILIES.register(
    "llama",
    Family(
        name="llama",
        text_model_type="llama",
        base_model_types=("llama",),
        published_types=("llama",),
        version="v1",
    ),
)
