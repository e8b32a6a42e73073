# SPDX-License-Identifier: Apache-2.0
"""Samples lie end to end in one row, and attention runs over each of them by itself.

    with padding   a a a . .       in one row   a a a b b b b b c c c c
                   b b b b b       lengths      3     5         4
                   c c c c .

No position is padding, no mask exists, and attention costs what its samples cost, not the square of the row. While a
batch is told, the decoder's config names `ATTENTION`, a function beside transformers' own: Hugging Face's forward stays
as it is, and makes no mask for a function that it does not know. Flash attention finds samples by their positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "sdpa_of_samples"

FLASH = "flash_attention"
"""What the names of transformers' implementations begin with that tell samples of a single row apart by themselves."""

_lengths: list[int] = []
"""Of the samples of the row that is being trained on. Not of one thread: a backward recomputes on others."""


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As transformers' `sdpa` on [1, heads, T, D]: [1, T, heads, D]; whatever else asks gets that one."""
    of_samples = len(query) == 1 and query.shape[2] == key.shape[2] == sum(_lengths)
    if not of_samples or attention_mask is not None or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    parts = zip(*(states.split(_lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *part, None, **options)[0] for part in parts], dim=1), None


AttentionInterface.register(ATTENTION, attend)


def is_flash(named: str | None) -> bool:
    """Whether an implementation of attention is flash attention, of whatever version."""
    return (named or "").startswith(FLASH)


class SampleAttention:
    """Inside, as a context, a decoder's attention keeps the samples of a row apart that it is told of.

    Args:
        model: a VLM.

    Attributes:
        is_on: whether it does; to be found out on the model.
    """

    def __init__(self, model: Any):
        self.is_on = False
        self.config = model.get_decoder().config
        self._usual = self.config._attn_implementation

    def suits(self, longest: int) -> bool:
        """Whether its attention may be called so: by a kernel of torch or flash attention, over samples as a whole.

        Args:
            longest: positions of the longest sample; attention over a window that is as long is one over all of it.
        """
        attention_types = set(getattr(self.config, "layer_types", None) or ()) - {"full_attention"}
        windows = [getattr(self.config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        is_whole = attention_types <= {"sliding_attention"} and all(
            window is None or window >= longest for window in windows
        )
        usual = self.config._attn_implementation
        return is_flash(usual) or (usual == "sdpa" and is_whole)

    def tell(self, lengths: Sequence[int] | None) -> None:
        """The samples of the next forward, and of its recomputation; None: it is no single row of samples."""
        if self.is_on and lengths and self._usual == "sdpa":
            _lengths[:] = lengths
            self.config._attn_implementation_internal = ATTENTION  # of this config alone, and of none within it

    def __enter__(self) -> SampleAttention:
        self._usual = self.config._attn_implementation
        return self

    def __exit__(self, *error: object) -> None:
        self.config._attn_implementation_internal = self._usual
        _lengths.clear()
