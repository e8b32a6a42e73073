# SPDX-License-Identifier: Apache-2.0
"""Llama 3.2 Vision: an image is one token, and text reads it through cross-attention.

Its class skips cross-attention for a batch without images. In a batch where another row has one, it masks what the MLPs
of such layers give for a row without, but not what their attention gives (huggingface/transformers issue 39379). Two
hooks for each layer mask that, too, so that rows without images compute what they compute alone.

Text before the first image of a row reads, in its class, all images of the row, the blank ones among them that fill it
up to the number of the batch. One more hook hides these, so that a row with images computes what it computes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import reduce, repeat
from torch import Tensor, nn

from moellava.data.collate import MediaCollator
from moellava.lmm.architecture import Architecture, register_architecture
from moellava.lmm.templates import IN_ORDER, filled
from moellava.model.build import read
from moellava.model.parts import LLAVA

_TEMPLATE = filled(
    "{{ bos_token }}{%- for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    + IN_ORDER
    + "{{ '<|eot_id|>' }}{%- endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "<|image|>",
)


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


@dataclass
class BlankImages:
    """The hook of the decoder.

    Args:
        length: states that an image has, those of tiles that it lacks included.
    """

    length: int

    def hide(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Before the decoder: text that reads no image in particular reads those of its own row.

        `cross_attention_mask` is [B, 1, L, images · length], 0 where a token reads a state, and all 0 for such text;
        `full_text_row_masked_out_mask` is [B, 1, L, 1], 0 for such text and 1 for any other. An image of a row is one
        that some token reads.
        """
        mask = kwargs.get("cross_attention_mask")
        if mask is None:
            return None
        reads = kwargs["full_text_row_masked_out_mask"].bool()
        shown = reduce((mask == 0) & reads, "b one l (i n) -> b one 1 i", torch.any, n=self.length)
        shown |= ~shown.any(dim=-1, keepdim=True)  # a row without images has its own hooks
        blank = repeat(~shown, "b one 1 i -> b one 1 (i n)", n=self.length)
        hidden = mask.masked_fill(blank & ~reads, torch.finfo(mask.dtype).min)
        return args, kwargs | {"cross_attention_mask": hidden}


def gate_rows(model: Any) -> None:
    """Adds the hooks to a model. They are no part of what is saved."""
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    model.get_decoder().register_forward_pre_hook(BlankImages(vision.max_num_tiles * patches).hide, with_kwargs=True)
    for layer in model.get_decoder().layers:
        if hasattr(layer, "cross_attn"):
            gate = RowGate()
            layer.register_forward_pre_hook(gate.remember, with_kwargs=True)
            layer.cross_attn.register_forward_hook(gate.silence)


def load_with_gates(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    """See `read`; with the hooks."""
    model = read(folder, config, dtype)
    gate_rows(model)
    return model


class CrossAttentionCollator(MediaCollator):
    """The model wants images in rows of the batch, also for rows that show none, and `cross_attention_mask`
    [B, L, images, tiles]: 1 where a token reads a tile. A token reads the last image before it; images that follow one
    another without a word between them are read together. A row without images reads nothing, and the model then
    computes for it what it computes without any image.
    """

    PER_IMAGE = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """See `MediaCollator`; with the model's further inputs."""
        batch = super().__call__(samples)
        if "aspect_ratio_mask" not in batch:  # prompts of text alone
            return batch
        with_images = [number for number, sample in enumerate(samples) if sample["media"]]
        for name in self.PER_IMAGE:
            shown = batch[name]
            batch[name] = shown.new_zeros(len(samples), *shown.shape[1:])
            batch[name][with_images or [0]] = shown
        tiles = batch["aspect_ratio_mask"].sum(-1)
        batch["aspect_ratio_mask"][..., 0] = 1  # what the image processor says of an image that is not there
        reads = batch["input_ids"].new_zeros(*batch["input_ids"].shape, *batch["aspect_ratio_mask"].shape[1:])
        for number in with_images:
            places = (batch["input_ids"][number] == self.reader.placeholder_id).nonzero().flatten().tolist()
            for image, (begin, end) in enumerate(spans_read(places, reads.shape[1])):
                reads[number, begin:end, image, : int(tiles[number, image])] = 1
        return batch | {"cross_attention_mask": reads}


def spans_read(places: Sequence[int], length: int) -> list[tuple[int, int]]:
    """The tokens (begin, end) that read each image, by the places of the images' tokens in a row of `length` tokens.

    places 0 3, length 8  ->  (0, 3) (3, 8)
    places 0 1, length 8  ->  (0, 8) (1, 8)
    """
    spans: list[tuple[int, int]] = []
    end = length
    for index in reversed(range(len(places))):
        following = places[index + 1] if index + 1 < len(places) else length
        end = end if following == places[index] + 1 else following
        spans.append((places[index], end))
    return spans[::-1]


LLAMA_3_2_VISION = register_architecture(
    Architecture(
        name="llama-3.2-vision",
        model_type="mllama",
        keywords=LLAVA._replace(vision_encoder=("vision_model",)),
        template=_TEMPLATE,
        load=load_with_gates,
        collator=CrossAttentionCollator,
        models={
            "llama-3.2-11b-vision-instruct": "meta-llama/Llama-3.2-11B-Vision-Instruct",
            "llama-3.2-90b-vision-instruct": "meta-llama/Llama-3.2-90B-Vision-Instruct",
        },
    )
)
