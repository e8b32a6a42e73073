# SPDX-License-Identifier: Apache-2.0
"""Qwen1.5, Qwen2 and Qwen2.5: Hugging Face's own names throughout."""

from __future__ import annotations

from moellava.model.families import FAMILIES, Family

QWEN2 = FAMILIES.register(
    "qwen2",
    Family(
        name="qwen2",
        text_model_type="qwen2",
        base_model_types=("qwen2",),
        published_types=("qwen1_5", "qwen1.5", "qwen2", "qwen"),
        version="qwen",
    ),
)
