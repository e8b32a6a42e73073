# SPDX-License-Identifier: Apache-2.0
"""How a composed model sees an image: as one square, in Hugging Face's LLaVA, or in tiles, in its LLaVA-NeXT.

LLaVA-1.6 (https://llava-vl.github.io/blog/2024-01-30-llava-next/) brings an image to the best of several grids of the
tower's squares, `image_grid_pinpoints`, and shows the tower each square and the whole image once more. What was padding
is left out of the language model's input, and each row of patches ends with a learnt vector, `image_newline`. So the
tokens of an image depend on its size; the processor and the model agree on how many there are.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PretrainedConfig,
)

from moellava.errors import UserError
from moellava.model.joined_towers import JoinedTowersConfig
from moellava.model.parts import LLAVA, Keywords
from moellava.model.projectors import ProjectorSpec
from moellava.model.tower_images import ASPECT_RATIOS, PLAIN
from moellava.model.towers import tower_shape, tower_tokens

ANYRES = "anyres"

WAYS = (*ASPECT_RATIOS, ANYRES)
"""Values of --image_aspect_ratio."""

IMAGE_NEWLINE = "image_newline"
"""The parameter that ends each row of patches."""

NEWLINE = f"model.{IMAGE_NEWLINE}"

USUAL_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Squares along height and width: those of LLaVA-1.6."""

PAIR = re.compile(r"\(\s*(\d+)\s*x\s*(\d+)\s*\)")


@dataclass(frozen=True)
class Layout:
    """A class of Hugging Face's that holds what is composed.

    Args:
        config: its config class.
        processor: of its processor.
        keywords: where its parts are.
    """

    config: type[PretrainedConfig]
    processor: Any
    keywords: Keywords


LAYOUTS = {
    layout.config.model_type: layout
    for layout in (
        Layout(LlavaConfig, LlavaProcessor, LLAVA),
        Layout(LlavaNextConfig, LlavaNextProcessor, LLAVA._replace(others=(IMAGE_NEWLINE,))),
    )
}
"""`model_type` -> layout."""


def layout_of(config: Any) -> Layout:
    """The layout of a composed model's config, extended or not."""
    return next(layout for layout in LAYOUTS.values() if isinstance(config, layout.config))


def tiled_config(
    config: LlavaConfig, projector: ProjectorSpec, pinpoints: str | Sequence[Sequence[int]] | None
) -> LlavaNextConfig:
    """A composed model's config, for images in tiles.

    Args:
        config: for one square.
        projector: it has to give a token for every patch.
        pinpoints: the grids, see `parse_pinpoints`; None: those of LLaVA-1.6.

    Raises:
        UserError: a tower or projector that cannot be shown tiles, or grids that are not made of the tower's squares.
    """
    vision, strategy = config.vision_config, config.vision_feature_select_strategy
    if isinstance(vision, JoinedTowersConfig):
        raise UserError(f"--image_aspect_ratio {ANYRES} takes one --image_tower, not {len(vision.configs)} joined.")
    shape = tower_shape(vision)
    if tower_tokens(vision, strategy) != shape.patches:
        raise UserError(
            f"--image_aspect_ratio {ANYRES} puts the patches of tiles together, but of this tower "
            f"{tower_tokens(vision, strategy)} tokens are taken where {shape.patches} are patches: use "
            "--mm_vision_select_feature patch, and a tower with at most one class token."
        )
    if config.image_seq_length != shape.patches:
        raise UserError(
            f"--image_aspect_ratio {ANYRES} needs a token for every patch, but the projector {projector.name} makes "
            f"{config.image_seq_length} of {shape.patches}: linear, mlp2x_gelu and the like do."
        )
    side = shape.side
    named = [] if pinpoints is None else parse_pinpoints(pinpoints, side)
    grids = [list(pair) for pair in named or [(side * high, side * wide) for high, wide in USUAL_GRIDS]]
    wrong = [pair for pair in grids if any(length < 1 or length % side for length in pair)]
    if wrong:
        raise UserError(
            f"--image_grid_pinpoints: {wrong[0][1]} × {wrong[0][0]} pixels are no whole number of the tower's squares "
            f"of {side} × {side}."
        )
    fields = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    fields |= {"vision_config": vision, "text_config": config.text_config, "image_grid_pinpoints": grids}
    return LlavaNextConfig(**fields)


def require_same_layout(given: str, own: str, called: str) -> None:
    """Raises UserError where a model is to be shown images in a way that takes another class.

    Args:
        given, own: values of --image_aspect_ratio.
        called: how messages name the model.
    """
    if (given == ANYRES) != (own == ANYRES):
        raise UserError(
            f"--image_aspect_ratio {given}, but {called} was put together for {own}: tiles and single squares are "
            "models of two classes. Leave the flag out: the folder says it."
        )


def parse_pinpoints(text: str | Sequence[Sequence[int]], side: int) -> list[tuple[int, int]]:
    """Grids as LLaVA's flag and config have them -> (height, width) in pixels.

    Args:
        text: a list of (width, height) in pixels, or `(1x1),...,(6x6)`: all from one number of squares to another.
        side: of the tower's squares, in pixels.

    Raises:
        UserError: neither of both.
    """
    pairs = [(int(wide), int(high)) for wide, high in PAIR.findall(text)] if isinstance(text, str) else []
    if pairs and "..." in str(text) and len(pairs) == 2:
        (first_wide, first_high), (last_wide, last_high) = pairs
        wides, highs = range(first_wide, last_wide + 1), range(first_high, last_high + 1)
        pairs = [(wide, high) for wide in wides for high in highs]
    if pairs:
        return [(side * high, side * wide) for wide, high in pairs]
    try:
        found = ast.literal_eval(text) if isinstance(text, str) else text
        return [(int(high), int(wide)) for wide, high in found]
    except (ValueError, SyntaxError, TypeError) as error:
        raise UserError(
            f"--image_grid_pinpoints {text}: give pairs of width and height in pixels, as [(336, 672), (672, 336)], or "
            "numbers of the tower's squares, as (1x1),...,(3x3)."
        ) from error


def tiling_image_processor(processor: Any, config: LlavaNextConfig) -> LlavaNextImageProcessorPil:
    """The image processor of a composed model that is shown tiles: LLaVA-NeXT's, with the numbers of the tower's own.

    Args:
        processor: the tower's own, or one that this function made.
    """
    if isinstance(processor, LlavaNextImageProcessorPil):
        return processor
    settings = {name: value for name, value in processor.to_dict().items() if name in PLAIN}
    side = tower_shape(config.vision_config).side
    settings |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return LlavaNextImageProcessorPil(**settings, image_grid_pinpoints=config.image_grid_pinpoints, do_pad=True)


def new_newline(config: LlavaNextConfig, dtype: torch.dtype) -> torch.Tensor:
    """[H]: an `image_newline` that has learnt nothing, drawn as LLaVA-1.6's."""
    width = config.text_config.hidden_size
    return (torch.randn(width) / width**0.5).to(dtype)
