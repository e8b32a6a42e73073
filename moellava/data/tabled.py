# SPDX-License-Identifier: Apache-2.0
"""An image processor of transformers whose last steps are looked up: rescaling and normalising, by channel and tone.

Processors that cut pictures into tiles or patches do so in ways of their own, which stay theirs. What they have in
common is `normalize(rescale(image))` of arrays of 8 bits, which takes three passes through floats: here one look at a
table (`tones.py`), and the same numbers to the bit.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np

from moellava.data.plain_pixels import noise
from moellava.data.tones import Tones, tones_of

STEPS = ("rescale", "normalize")
"""Methods of an image processor that have to be those of its base class."""


class Tabled:
    """Before an image processor's class. Made by `tabled`.

    Attributes:
        plain: the image processor as it was.
        tones: of it.
    """

    plain: Any
    tones: Tones

    def rescale(self, image: np.ndarray, scale: float, **options: Any) -> np.ndarray:
        """An image of 8 bits as it is: `normalize` comes next."""
        if image.dtype == np.uint8:
            return image
        return super().rescale(image, scale, **options)  # type: ignore[misc]

    def normalize(self, image: np.ndarray, mean: Any, std: Any, **options: Any) -> np.ndarray:
        """[3, H, W] rescaled and normalised."""
        if image.dtype == np.uint8:
            return self.tones.pixels([image])[0].numpy()
        return super().normalize(image, mean, std, **options)  # type: ignore[misc]

    def __reduce__(self) -> tuple[Any, ...]:
        """Its class is made anew where it arrives."""
        return _made, (self.plain,)


def with_table(processor: Any) -> Any:
    """A processor of texts and images that makes the same of both, faster where that can be (`tabled`)."""
    fast = copy.copy(processor)
    fast.image_processor = tabled(processor.image_processor)
    return fast


def tabled(processor: Any) -> Any:
    """The same image processor, faster; itself where its steps are others, or anything would differ."""
    tones = tones_of(processor)
    if tones is None or not (processor.do_rescale and processor.do_normalize) or not _has_usual_steps(processor):
        return processor
    made = _made(processor)
    return made if all(_alike(processor, made, picture) for picture in noise()) else processor


def _made(processor: Any) -> Any:
    made: Any = copy.copy(processor)
    made.__class__ = _class_before(type(processor))  # type: ignore[arg-type]
    made.plain, made.tones = processor, Tones(processor)
    return made


@cache
def _class_before(cls: type) -> type:
    return type(cls.__name__, (Tabled, cls), {})


def _has_usual_steps(processor: Any) -> bool:
    from transformers.image_processing_backends import PilBackend

    return all(getattr(type(processor), step) is getattr(PilBackend, step) for step in STEPS)


def _alike(processor: Any, other: Any, picture: Any) -> bool:
    """Whether both make the same of a picture, to the bit. False where it cannot be told."""
    try:
        wanted, found = (dict(each([picture], return_tensors="pt")) for each in (processor, other))
    except (ValueError, ZeroDivisionError, IndexError):  # as processors refuse pictures of some shapes
        return False
    return wanted.keys() == found.keys() and all(
        type(wanted[name]) is type(found[name]) and np.array_equal(wanted[name], found[name]) for name in wanted
    )
