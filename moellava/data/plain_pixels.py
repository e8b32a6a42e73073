# SPDX-License-Identifier: Apache-2.0
"""What a plain image processor makes of images, the same to the bit, without its detours.

Image processors of transformers that need no torchvision turn an image into an array, that into an image again, and
work through three arrays of floats. All that they do to a pixel after resizing depends on its channel and its tone
alone, so it is looked up here (`tones.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from moellava.data.strips import strip_of
from moellava.data.tones import Tones

STEPS = ("preprocess", "process_image", "resize", "center_crop", "rescale", "normalize")
"""Methods of an image processor that have to be those of its base class."""

SHAPES = ((56, 56), (72, 40), (41, 103))
"""Widths and heights of `noise`."""


class PlainPixels:
    """Resizing, cutting out the centre, rescaling and normalising, after padding to a square where that is asked for.

    Args:
        processor: does this and nothing else. See `plain_pixels`.
    """

    def __init__(self, processor: Any):
        size = dict(processor.size)
        self._shortest = size.get("shortest_edge")
        self._fixed: tuple[int, int] = (size.get("width") or 0, size.get("height") or 0)
        self._resample = processor.resample
        crop = dict(processor.crop_size) if processor.do_center_crop else {}
        self._crop = (crop["width"], crop["height"]) if crop else None
        pads = bool(getattr(processor, "do_pad", False))
        self._background = tuple(int(tone * 255) for tone in processor.image_mean) if pads else None
        self._tones = Tones(processor)

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """`pixel_values` [B, 3, H, W] of RGB images."""
        return self._tones.pixels([np.asarray(self._cut(image)).transpose(2, 0, 1) for image in images])

    def _cut(self, image: Image.Image) -> Image.Image:
        """An image of the size that the model takes."""
        resized = self._resized(image) if self._background is None else self._squared(image, self._background)
        width, height = resized.size
        if self._crop is None:
            return resized
        left, top = (width - self._crop[0]) // 2, (height - self._crop[1]) // 2
        return resized.crop((left, top, left + self._crop[0], top + self._crop[1]))

    def _resized(self, image: Image.Image) -> Image.Image:
        return image.resize(self._size_of(*image.size), resample=self._resample)

    def _squared(self, image: Image.Image, background: tuple[int, ...]) -> Image.Image:
        """An image in the middle of a square of its longer side, resized.

        Of a square Pillow resizes the rows first, each for itself, and the columns of what that gives. So rows that are
        nothing but background need not be resized, nor do columns. Of what is left it is asked for one and then the
        other: of a high picture Pillow 13 would begin with the columns.
        """
        width, height = image.size
        side = max(width, height)
        columns, rows = self._size_of(side, side)
        if width > height:
            within = image.resize((columns, height), resample=self._resample)
            padded = Image.new("RGB", (columns, side), background)
            padded.paste(within, (0, (side - height) // 2))
            return padded.resize((columns, rows), resample=self._resample)
        before = (side - width) // 2
        left, right = 0, side
        if self._resample == Image.Resampling.BICUBIC:
            left, right = strip_of(side, before, before + width, columns)
        strip = Image.new("RGB", (right - left, side), background)
        strip.paste(image, (before - left, 0))
        width = (right - left) * columns // side
        resized = strip.resize((width, side), resample=self._resample).resize((width, rows), resample=self._resample)
        if resized.width == columns:
            return resized
        whole = Image.new("RGB", (columns, rows), background)
        whole.paste(resized, (left * columns // side, 0))
        return whole

    def _size_of(self, width: int, height: int) -> tuple[int, int]:
        """Width and height to which an image is brought."""
        if self._shortest is None:
            return self._fixed
        short, long = sorted((width, height))
        length = int(self._shortest * long / short)
        return (self._shortest, length) if width <= height else (length, self._shortest)


def plain_pixels(processor: Any) -> PlainPixels | None:
    """What does the same as an image processor, faster; None where it does more, or makes anything else of a picture.

    Args:
        processor: of transformers.
    """
    plain = untried(processor)
    if plain is None:
        return None
    for picture in noise():
        theirs = processor([picture], return_tensors="pt")
        if set(theirs) != {"pixel_values"} or not torch.equal(theirs["pixel_values"], plain([picture])):
            return None
    return plain


def untried(processor: Any) -> PlainPixels | None:
    """`plain_pixels` where the class and the settings are proof enough: that of a class that is known here."""
    return PlainPixels(processor) if _is_plain(processor) else None


def noise() -> list[Image.Image]:
    """Pictures of several shapes and all tones, to try a processor on."""
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (high, wide, 3), np.uint8)) for wide, high in SHAPES]


def _is_plain(processor: Any) -> bool:
    """Whether a processor's class takes each of the steps as its base class does, and its settings are those that are
    known here. LLaVA's is that one class which pads as well."""
    from transformers import LlavaImageProcessorPil
    from transformers.image_processing_backends import PilBackend

    cls = type(processor)
    if cls is not LlavaImageProcessorPil:
        own = ("_preprocess", *STEPS) if issubclass(cls, PilBackend) else ("",)
        if any(getattr(cls, step, None) is not getattr(PilBackend, step, cls) for step in own):
            return False
        if getattr(processor, "do_pad", False):
            return False
    size = {name: side for name, side in dict(processor.size or {}).items() if side}
    if not processor.do_resize or set(size) not in ({"shortest_edge"}, {"height", "width"}):
        return False
    if getattr(processor, "do_pad", False) and len(set(size.values())) > 1:
        return False  # Pillow may resize the columns of a square first, if more of them go
    # A picture that is smaller than what is cut out of it would be padded.
    return not processor.do_center_crop or max(dict(processor.crop_size).values()) <= min(size.values())
