# SPDX-License-Identifier: Apache-2.0
"""Image processors of towers: the one beside a tower, brought to its size, padded to a square, or several in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import (
    BaseImageProcessor,
    BatchFeature,
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    PixtralImageProcessorPil,
    PretrainedConfig,
    SiglipImageProcessorPil,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from moellava.errors import UserError
from moellava.files import read_object
from moellava.log import get_logger
from moellava.model.joined_towers import JoinedTowersConfig, stacked
from moellava.model.tower_probes import FAILURES, PIXELS, shape_of

logger = get_logger(__name__)

ASPECT_RATIOS = ("square", "pad")

SETTINGS, PROCESSOR = "preprocessor_config.json", "processor_config.json"

DEFAULTS: dict[str, type[BaseImageProcessor]] = {
    "clip_vision_model": CLIPImageProcessorPil,
    "siglip_vision_model": SiglipImageProcessorPil,
}
"""`model_type` of a tower -> the image processor where none lies beside it and transformers has none for that type."""

PLAIN = {
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize"),
    *("image_mean", "image_std", "do_convert_rgb"),
}
"""Settings of image processors that resize, cut out the centre, rescale and normalise: all that a tower needs."""

SHAPES = ((56, 56), (72, 40), (40, 104))
"""Widths and heights of the pictures that an image processor is tried on."""


class JoinedImageProcessor(BaseImageProcessor):
    """One image processor for several towers: what each makes of an image, one picture below the other.

    Args:
        parts: for each tower the settings of its own, the class under `image_processor_type`.
    """

    model_input_names = [PIXELS]

    def __init__(self, parts: Sequence[Mapping[str, Any]] = (), **kwargs: Any):
        super().__init__(**kwargs)
        self.parts = [dict(part) for part in parts]

    @property
    def processors(self) -> list[BaseImageProcessor]:
        """Those of the towers."""
        return [
            processor_class(str(part.get("image_processor_type")))(
                **{name: value for name, value in part.items() if name in PLAIN | {"do_pad"}}
            )
            for part in self.parts
        ]

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        """`pixel_values` [B, 3, H, W] of images. See `stacked`."""
        pictures = [processor(images, return_tensors="pt")[PIXELS] for processor in self.processors]
        return BatchFeature({PIXELS: stacked(pictures)})

    def to_dict(self) -> dict[str, Any]:
        """For a folder's processor_config.json."""
        return {"image_processor_type": type(self).__name__, "parts": self.parts}


def joined(processors: Sequence[BaseImageProcessor]) -> BaseImageProcessor:
    """One image processor of those of all towers; of a single one, itself."""
    if len(processors) == 1:
        return processors[0]
    parts = [{name: value for name, value in one.to_dict().items() if name in PLAIN | {"do_pad"}} for one in processors]
    named = zip(processors, parts, strict=True)
    return JoinedImageProcessor([part | {"image_processor_type": type(one).__name__} for one, part in named])


def processor_class(name: str) -> Any:
    """An image processor of transformers that needs no torchvision. Raises UserError: a folder names something else."""
    found = getattr(transformers, name, None) if name.endswith("Pil") else None
    if not isinstance(found, type) or not issubclass(found, BaseImageProcessor):
        raise UserError(f"An image processor of the folder is named {name!r}, which is none of transformers.")
    return found


def tower_image_processor(folder: Path, config: PretrainedConfig) -> BaseImageProcessor:
    """What makes the pictures of a tower: the image processor beside it, or the default of its class; where that gives
    pictures of other sizes than the tower's, the same resizing, cutting and normalising for the tower's.

    Raises:
        UserError: there is none, or what it does cannot be told from its settings.
    """
    side = shape_of(config).side
    settings = settings_beside(folder)
    named = class_named(settings) or DEFAULTS.get(config.model_type) or usual_class(config.model_type)
    if named is not None:
        own = named(**settings) if settings else sized(named(), side)
        if gives_squares(own, side):
            return own
        settings = own.to_dict()
    if not settings.get("image_mean") or not settings.get("image_std"):
        raise UserError(
            f"{folder} holds no {SETTINGS} with an image_mean and an image_std, and transformers has no image "
            f"processor for a {config.model_type}: copy the file from where the tower comes from."
        )
    logger.info("Images are brought to %d × %d pixels, which %s reads.", side, side, folder)
    return resized(settings, side)


def settings_beside(folder: Path) -> dict[str, Any]:
    """The settings of the image processor in a folder: a file of their own, or part of a processor's; {}: neither."""
    if (folder / SETTINGS).is_file():
        return read_object(folder / SETTINGS)
    whole = read_object(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else {}
    settings = whole.get("image_processor")
    return settings if isinstance(settings, dict) else {}


def class_named(settings: Mapping[str, Any]) -> type[BaseImageProcessor] | None:
    """The class that a preprocessor_config.json names, in its version that needs no torchvision; None: it has none."""
    name = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
    name = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Pil").removesuffix("Fast")
    return processor_class(f"{name}Pil") if hasattr(transformers, f"{name}Pil") else None


def usual_class(model_type: str) -> type[BaseImageProcessor] | None:
    """The image processor that transformers has for a type of model, without torchvision; None: there is none."""
    name = (IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}).get("pil")
    return getattr(transformers, name) if name else None


def sized(default: Any, side: int) -> BaseImageProcessor:
    """A class's default settings, for pictures of a size."""
    return resized(default.to_dict(), side, type(default))


def resized(
    settings: Mapping[str, Any], side: int, wanted: type[BaseImageProcessor] | None = None
) -> BaseImageProcessor:
    """An image processor with these settings whose pictures are `side` pixels high and wide.

    Args:
        settings: of another one; what it cuts off of an image stays the same fraction.
        side: in pixels.
        wanted: its class; None: CLIP's where it cuts out the centre, else SigLIP's.
    """
    kept = {name: settings[name] for name in PLAIN if settings.get(name) is not None}
    square = {"height": side, "width": side}
    if kept.get("do_center_crop"):
        edge, crop = (dict(kept.get(name) or {}) for name in ("size", "crop_size"))
        shortest, old = edge.get("shortest_edge"), crop.get("height")
        kept["size"] = {"shortest_edge": round(side * shortest / old) if shortest and old else side}
        return (wanted or CLIPImageProcessorPil)(**kept | {"crop_size": square})
    kept.pop("crop_size", None)
    return (wanted or SiglipImageProcessorPil)(**kept | {"size": square, "do_resize": True})


def gives_squares(processor: BaseImageProcessor, side: int) -> bool:
    """Whether it makes one picture of `side` × `side` pixels of every image, and nothing else."""
    try:
        made = [processor(Image.new("RGB", shape), return_tensors="pt") for shape in SHAPES]
    except FAILURES:
        return False
    return all(set(one) == {PIXELS} and tuple(one[PIXELS].shape) == (1, 3, side, side) for one in made)


def composed_image_processor(processor: BaseImageProcessor, aspect_ratio: str) -> Any:
    """The image processor of a composed model.

    Args:
        processor: the tower's own, or one that this function made.
        aspect_ratio: 'square' is the tower's own (CLIP's crops the centre); 'pad' first pads the image to a square in
            the mean colour, which Hugging Face's LLaVA processor does without our code.

    Raises:
        UserError: any other `aspect_ratio`, or a processor whose work LLaVA's does not do.
    """
    if aspect_ratio not in ASPECT_RATIOS:
        raise UserError(f"--image_aspect_ratio {aspect_ratio!r} is unknown. Known: {', '.join(ASPECT_RATIOS)}")
    if isinstance(processor, JoinedImageProcessor):
        return joined([composed_image_processor(one, aspect_ratio) for one in processor.processors])
    if isinstance(processor, PixtralImageProcessorPil):
        processor = resized(processor.to_dict(), processor.size["longest_edge"])
    is_padding = isinstance(processor, LlavaImageProcessorPil)
    if is_padding == (aspect_ratio == "pad"):
        return processor
    settings = {name: value for name, value in processor.to_dict().items() if name in PLAIN}
    # A tower that takes the whole image (SigLIP) has no setting for the crop, where LLaVA's processor has a default.
    settings["do_center_crop"] = bool(settings.get("do_center_crop"))
    if aspect_ratio == "square":
        return (CLIPImageProcessorPil if settings["do_center_crop"] else SiglipImageProcessorPil)(**settings)
    padding = LlavaImageProcessorPil(**settings, do_pad=True)
    check_same(processor, padding)
    return padding


def check_same(own: Any, other: Any) -> None:
    """Raises UserError unless two image processors make the same of a square picture, which needs no padding."""
    picture = Image.effect_mandelbrot((64, 64), (-3, -2.5, 2, 2.5), 20).convert("RGB")
    one, two = (processor(picture, return_tensors="pt")[PIXELS] for processor in (own, other))
    if one.shape != two.shape or not torch.allclose(one, two, atol=1e-5):
        raise UserError(
            f"--image_aspect_ratio pad: the tower's {type(own).__name__} does more than resize, cut and normalise, "
            "which is all that LLaVA's does after padding. Use square."
        )


def canvas_of(config: PretrainedConfig) -> tuple[int, int]:
    """Height and width of a tower's `pixel_values`, in pixels."""
    if isinstance(config, JoinedTowersConfig):
        return config.image_size[0], config.image_size[1]
    side = shape_of(config).side
    return side, side
