# SPDX-License-Identifier: Apache-2.0
"""Opens a model that a conversion changes in memory."""

from __future__ import annotations

import torch

from moellava.model.description import Description
from moellava.vlm import VLM, build


def build_whole(description: Description, source: str) -> VLM:
    """The model of a description as a whole, in its own precision. Raises UserError where it has no tokenizer."""
    vlm = build(description, description.config.dtype or torch.float32, source)
    vlm.require_tokenizer()
    return vlm
