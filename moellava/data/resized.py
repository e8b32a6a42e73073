# SPDX-License-Identifier: Apache-2.0
"""Pictures on their way from Pillow into an image processor's arrays, and there and back where it resizes them.

Transformers copies a picture four times on the way in and out of Pillow, looks whether its numbers may be floats
between 0 and 1, and whether it has channels first or last. Of pictures of 8 bits in three channels all that is known,
and the first picture that is resized is the one that came.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from PIL import Image


class Pictured(np.ndarray):
    """The array of a picture, which it has with it. What is made of the array has none.

    Attributes:
        picture: in Pillow.
    """

    picture: Image.Image


class Resized:
    """Behind an image processor's class and before its base class, of which it takes over three steps."""

    def process_image(self, image: Any, *some: Any, **options: Any) -> np.ndarray:
        """[3, H, W] of a picture, with the picture where nothing becomes of it."""
        made = super().process_image(image, *some, **options)  # type: ignore[misc]
        if not is_plain(image) or type(self).convert_to_rgb is not Resized.convert_to_rgb:
            return made
        pictured = made.view(Pictured)
        pictured.picture = image
        return pictured

    def convert_to_rgb(self, image: Any, **options: Any) -> np.ndarray:
        """[H, W, 3] of a picture."""
        return np.array(image) if is_plain(image) else super().convert_to_rgb(image, **options)  # type: ignore[misc]

    def resize(self, image: np.ndarray, size: Any, resample: Any = None, **options: Any) -> np.ndarray:
        """[3, H, W], where the height and the width are said."""
        said = {name for name, side in dict(size).items() if side}
        if options or resample is None or said != {"height", "width"} or image.dtype != np.uint8 or len(image) != 3:
            return super().resize(image, size, resample, **options)  # type: ignore[misc]
        picture = getattr(image, "picture", None) or Image.fromarray(image.transpose(1, 2, 0))
        resized = picture.resize((size.width, size.height), resample)
        return np.asarray(resized).transpose(2, 0, 1)  # nobody else has these numbers: no second copy


def is_plain(image: Any) -> bool:
    """Whether an image is one of Pillow's in RGB, none of whose colours stands for transparency."""
    return isinstance(image, Image.Image) and image.mode == "RGB" and "transparency" not in image.info


@functools.cache
def quicker_base() -> type:
    """What takes the place of an image processor's base class."""
    from transformers.image_processing_backends import PilBackend

    return type(PilBackend.__name__, (Resized, PilBackend), {})
