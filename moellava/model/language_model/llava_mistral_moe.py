# SPDX-License-Identifier: Apache-2.0
"""Mistral and what is tuned from it, OpenChat for one: Hugging Face's own names throughout."""

from __future__ import annotations

from moellava.model.families import FAMILIES, Family

MISTRAL = FAMILIES.register(
    "mistral",
    Family(
        name="mistral",
        text_model_type="mistral",
        base_model_types=("mistral",),
        published_types=("mistral",),
        version="openchat",
    ),
)
