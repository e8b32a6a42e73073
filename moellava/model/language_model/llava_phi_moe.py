# SPDX-License-Identifier: Apache-2.0
"""Phi-1.5 and Phi-2: a two-layer MLP beside the attention, and a head with a bias.

Checkpoints of LLaVA's code were written without that bias; a model composed from the base keeps it (see `extended.py`).
"""

from __future__ import annotations

from moellava.model.families import FAMILIES, Family

PHI = FAMILIES.register(
    "phi",
    Family(
        name="phi",
        text_model_type="phi",
        base_model_types=("phi",),
        published_types=("phi",),
        version="phi",
    ),
)
