# SPDX-License-Identifier: Apache-2.0
"""Opens a model that a conversion changes in memory."""

from __future__ import annotations

from pathlib import Path

import torch

from moellava.log import get_logger
from moellava.model.description import Description
from moellava.model.weights import has_weights, read_tensors
from moellava.vlm import VLM, build

logger = get_logger(__name__)


def build_whole(description: Description, source: str) -> VLM:
    """The model of a description as a whole, in its own precision: that of its config, or else of its widest tensor.
    The log says where that is not the precision of all that it holds. Raises UserError where it has no tokenizer."""
    stored = _stored_dtypes(description.folder)
    dtype = description.config.dtype or max(stored, key=lambda each: torch.finfo(each).bits, default=torch.float32)
    vlm = build(description, dtype, source)
    vlm.require_tokenizer()
    if other := stored - {dtype}:
        logger.warning(
            "%s holds tensors in %s; they are written in %s, %s",
            source,
            ", ".join(sorted(map(_name, other))),
            _name(dtype),
            "which its config.json says" if description.config.dtype else "which most bits are kept in",
        )
    return vlm


def _stored_dtypes(folder: Path) -> set[torch.dtype]:
    """The floating dtypes of a folder's own weights; none where it holds a projector or an adapter alone."""
    tensors = read_tensors(folder).values() if has_weights(folder) else ()
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
