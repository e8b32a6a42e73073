"""Llama 3.2 Vision: rows of a batch that show no image compute what they compute alone.

Its class skips cross-attention for a batch without images. In a batch where another row has one, it masks what the MLPs
of such layers give for a row without, but not what their attention gives (huggingface/transformers issue 39379). Two
hooks for each layer mask that, too. A row with images computes what it always did.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class RowGate:
    """The hooks of one cross-attention layer."""

    def __init__(self) -> None:
        self.shows: Tensor | None = None
        """[B, 1, 1]: 1 for rows with an image, 0 for others; None where the model was given no mask."""

    def remember(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before the layer: which rows have a token that reads an image. Their mask is [B, 1, L, 1]."""
        mask = kwargs.get("full_text_row_masked_out_mask")
        self.shows = None if mask is None else mask[:, 0].amax(dim=1, keepdim=True)

    def silence(self, attention: nn.Module, args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        """After its attention: nothing for rows without an image."""
        if self.shows is None:
            return output
        attended, *rest = output
        return attended * self.shows.to(attended.dtype), *rest


def gate_rows(model: Any) -> None:
    """Adds the hooks to every cross-attention layer of a model. They are no part of what is saved."""
    for layer in model.get_decoder().layers:
        if hasattr(layer, "cross_attn"):
            gate = RowGate()
            layer.register_forward_pre_hook(gate.remember, with_kwargs=True)
            layer.cross_attn.register_forward_hook(gate.silence)
