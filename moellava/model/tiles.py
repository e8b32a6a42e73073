# SPDX-License-Identifier: Apache-2.0
"""How a composed model sees an image: as one square, in Hugging Face's LLaVA, or in tiles, in its LLaVA-NeXT or
LLaVA-OneVision.

LLaVA-1.6 (https://llava-vl.github.io/blog/2024-01-30-llava-next/) brings an image to the best of several grids of the
tower's squares, `image_grid_pinpoints`, and shows the tower each square and the whole image once more. What was padding
is left out of the language model's input, and each row of patches ends with a learnt vector, `image_newline`. So the
tokens of an image depend on its size; the processor and the model agree on how many there are.

LLaVA-OneVision (arXiv:2408.03326, section 3.2) has larger grids and a bound: where the tiles have more than N times the
patches of one, their features are interpolated down to so many (`anyres_max_N`). Of several images of a record each is
one square, padded, whose patches end with one `image_newline`.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PretrainedConfig,
)
from transformers.utils.import_utils import is_torchvision_available

from moellava.constants import TILED
from moellava.data.frame_processors import onevision_frames, with_frames
from moellava.errors import UserError
from moellava.model.joined_towers import JoinedTowersConfig
from moellava.model.parts import LLAVA, Keywords
from moellava.model.projectors import ProjectorSpec
from moellava.model.tower_images import ASPECT_RATIOS, PLAIN
from moellava.model.towers import counting, tower_shape, tower_tokens

ANYRES = "anyres"

WAYS = (*ASPECT_RATIOS, ANYRES, "anyres_max_N")
"""Values of --image_aspect_ratio."""

IMAGE_NEWLINE = "image_newline"
"""The parameter that ends each row of patches."""

NEWLINE = f"model.{IMAGE_NEWLINE}"

SLACK = 1.1
"""By how much the sides of the tiles together may exceed the bound before they are interpolated."""

PAIR = re.compile(r"\(\s*(\d+)\s*x\s*(\d+)\s*\)")


@dataclass(frozen=True)
class Layout:
    """A class of Hugging Face's that holds what is composed.

    Args:
        config: its config class.
        processor: of its processor.
        keywords: where its parts are.
        counted: (config, tokens that the projector gives of one square) -> fields of the processor, by which it counts.
        grids: squares along height and width that tiles are put into where no flag names others; () without tiles.
        images: class of its image processor; None: the tower's own.
        sizes: side of the tower's squares in pixels -> settings of the image processor.
        frames: settings of one square -> its video processor; None: it has none.
    """

    config: type[PretrainedConfig]
    processor: Any
    keywords: Keywords
    counted: Callable[[Any, int], dict[str, Any]]
    grids: tuple[tuple[int, int], ...] = ()
    images: Any = None
    sizes: Callable[[int], dict[str, Any]] = lambda side: {}
    frames: Callable[[dict[str, Any]], Any] | None = None


def counted_patches(config: Any, tokens: int) -> dict[str, Any]:
    """How LLaVA's processor and LLaVA-NeXT's count. Arguments: see `Layout.counted`."""
    return counting(config.vision_config, config.vision_feature_select_strategy, tokens)


def counted_tokens(config: Any, tokens: int) -> dict[str, Any]:
    """How LLaVA-OneVision's processor counts: it takes off the class token itself. Arguments: see `Layout.counted`."""
    strategy = config.vision_feature_select_strategy
    return {
        "num_image_tokens": tokens + (strategy == "default"),
        "vision_feature_select_strategy": strategy,
        "vision_aspect_ratio": config.vision_aspect_ratio,
    }


def square(side: int) -> dict[str, int]:
    """A size as image processors have it."""
    return {"height": side, "width": side}


IN_TILES = LLAVA._replace(others=(IMAGE_NEWLINE,))

LAYOUTS = {
    layout.config.model_type: layout
    for layout in (
        Layout(LlavaConfig, LlavaProcessor, LLAVA, counted_patches),
        Layout(
            LlavaNextConfig,
            LlavaNextProcessor,
            IN_TILES,
            counted_patches,
            grids=((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
            images=LlavaNextImageProcessorPil,
            sizes=lambda side: {"size": {"shortest_edge": side}, "crop_size": square(side)},
        ),
        Layout(
            LlavaOnevisionConfig,
            LlavaOnevisionProcessor if is_torchvision_available() else with_frames(LlavaOnevisionProcessor),
            IN_TILES,
            counted_tokens,
            grids=tuple((high, wide) for high in range(1, 7) for wide in range(1, 7)),
            images=LlavaOnevisionImageProcessorPil,
            sizes=lambda side: {"size": square(side), "do_center_crop": False},
            frames=onevision_frames,
        ),
    )
}
"""`model_type` -> layout. The grids are those of LLaVA-1.6 and of LLaVA-OneVision."""


def layout_of(config: Any) -> Layout:
    """The layout of a composed model's config, extended or not."""
    return next(layout for layout in LAYOUTS.values() if isinstance(config, layout.config))


def layout_for(aspect_ratio: str) -> Layout:
    """The layout that shows images in a way: a value of --image_aspect_ratio."""
    tiled = TILED.fullmatch(aspect_ratio)
    return LAYOUTS["llava" if tiled is None else "llava_onevision" if tiled["cap"] else "llava_next"]


def tiled_config(
    config: LlavaConfig,
    projector: ProjectorSpec,
    aspect_ratio: str,
    pinpoints: str | Sequence[Sequence[int]] | None,
) -> Any:
    """A composed model's config, for images in tiles.

    Args:
        config: for one square.
        projector: it has to give a token for every patch.
        aspect_ratio: a value of --image_aspect_ratio.
        pinpoints: the grids, see `parse_pinpoints`; None: those that the layout has.

    Raises:
        UserError: a tower or projector that cannot be shown tiles, or grids that are not made of the tower's squares.
    """
    vision, strategy = config.vision_config, config.vision_feature_select_strategy
    if isinstance(vision, JoinedTowersConfig):
        raise UserError(
            f"--image_aspect_ratio {aspect_ratio} takes one --image_tower, not {len(vision.configs)} joined."
        )
    shape = tower_shape(vision)
    if tower_tokens(vision, strategy) != shape.patches:
        raise UserError(
            f"--image_aspect_ratio {aspect_ratio} puts the patches of tiles together, but of this tower "
            f"{tower_tokens(vision, strategy)} tokens are taken where {shape.patches} are patches: use "
            "--mm_vision_select_feature patch, and a tower with at most one class token."
        )
    if config.image_seq_length != shape.patches:
        raise UserError(
            f"--image_aspect_ratio {aspect_ratio} needs a token for every patch, but the projector {projector.name} "
            f"makes {config.image_seq_length} of {shape.patches}: linear, mlp2x_gelu and the like do."
        )
    layout, side = layout_for(aspect_ratio), shape.side
    named = [] if pinpoints is None else parse_pinpoints(pinpoints, side)
    grids = [list(pair) for pair in named or [(side * high, side * wide) for high, wide in layout.grids]]
    wrong = [pair for pair in grids if any(length < 1 or length % side for length in pair)]
    if wrong:
        raise UserError(
            f"--image_grid_pinpoints: {wrong[0][1]} × {wrong[0][0]} pixels are no whole number of the tower's squares "
            f"of {side} × {side}."
        )
    bound, longest = TILED.fullmatch(aspect_ratio), max(length // side for pair in grids for length in pair)
    if bound and bound["cap"] and SLACK * int(bound["cap"]) * shape.grid < longest:
        raise UserError(
            f"--image_aspect_ratio {aspect_ratio}: of a narrow image, cut into {longest} squares in a row, the bound "
            f"would leave no patch. Use anyres_max_{math.ceil(longest / SLACK / shape.grid)} or more, or shorter "
            "--image_grid_pinpoints."
        )
    fields = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    fields |= {"vision_config": vision, "text_config": config.text_config, "image_grid_pinpoints": grids}
    return with_ratio(layout.config(**fields), aspect_ratio)


def with_ratio(config: Any, aspect_ratio: str) -> Any:
    """A composed model's config, which gets the bound that a value of --image_aspect_ratio names."""
    if hasattr(config, "vision_aspect_ratio"):
        config.vision_aspect_ratio = aspect_ratio
    return config


def require_same_layout(given: str, own: str, called: str) -> None:
    """Raises UserError where a model is to be shown images in a way that takes another class.

    Args:
        given, own: values of --image_aspect_ratio.
        called: how messages name the model.
    """
    if layout_for(given) is not layout_for(own):
        raise UserError(
            f"--image_aspect_ratio {given}, but {called} was put together for {own}: single squares, tiles (anyres) "
            "and tiles with a bound (anyres_max_N) are models of three classes. Leave the flag out: the folder says it."
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


def tiling_image_processor(processor: Any, config: Any) -> Any:
    """The image processor of a composed model that is shown tiles: its layout's, with the numbers of the tower's own.

    Args:
        processor: the tower's own, or one that this function made.
        config: the composed model's.
    """
    layout = layout_of(config)
    if isinstance(processor, layout.images):
        return processor
    settings = {name: value for name, value in processor.to_dict().items() if name in PLAIN}
    settings |= layout.sizes(tower_shape(config.vision_config).side)
    return layout.images(**settings, image_grid_pinpoints=config.image_grid_pinpoints, do_pad=True)


def around(layout: Layout, images: Any, tokenizer: Any, settings: Mapping[str, Any] | None) -> list[Any]:
    """The parts of a composed model's processor, in the order that its class takes them.

    Args:
        images: its image processor.
        settings: of its video processor, if it has one; None: those of the image processor.
    """
    if layout.frames is None:
        return [images, tokenizer]
    shared = {name: value for name, value in images.to_dict().items() if name in PLAIN}
    return [images, tokenizer, layout.frames(dict(settings) if settings else shared)]


def new_newline(config: Any, dtype: torch.dtype) -> torch.Tensor:
    """[H]: an `image_newline` that has learnt nothing, drawn as LLaVA-1.6's."""
    width = config.text_config.hidden_size
    return (torch.randn(width) / width**0.5).to(dtype)
