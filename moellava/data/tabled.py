# SPDX-License-Identifier: Apache-2.0
"""An image processor of transformers whose last steps are looked up: rescaling and normalising, by channel and tone.

Processors that cut pictures into tiles or patches do so in ways of their own, which stay theirs. What they have in
common is `normalize(rescale(image))` of arrays of 8 bits, which takes three passes through floats: here one look at a
table (`tones.py`), and the same numbers to the bit. Their pictures go into arrays and through Pillow's resizing without
detours (`resized.py`), and patches are cut while a pixel is a byte (`patched.py`).
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from moellava.data.patched import Patched, cuts_patches, steps_of
from moellava.data.plain_pixels import noise
from moellava.data.resized import quicker_base
from moellava.data.tones import Tones, tones_of

STEPS = ("rescale", "normalize")
"""Methods of an image processor that have to be those of its base class."""


class Tabled:
    """Before an image processor's class; made by `tabled`. It has the settings of the one that it stands for, which may
    be changed there.

    Attributes:
        plain: the image processor as it was.
        tones: of it, as `steps` were.
    """

    plain: Any
    tones: Tones
    steps: tuple[Any, ...]

    def rescale(self, image: np.ndarray, scale: float, **options: Any) -> np.ndarray:
        """An image of 8 bits as it is: `normalize` comes next."""
        if image.dtype == np.uint8 and self.plain.do_normalize:
            return image
        return super().rescale(image, scale, **options)  # type: ignore[misc]

    def normalize(self, image: np.ndarray, mean: Any, std: Any, **options: Any) -> np.ndarray:
        """[3, H, W] rescaled and normalised."""
        if image.dtype == np.uint8 and self.plain.do_rescale:
            if steps_of(self.plain) == self.steps:
                return self.tones.pixels([image])[0].numpy()
            image = super().rescale(image, self.plain.rescale_factor)  # type: ignore[misc]
        return super().normalize(image, mean, std, **options)  # type: ignore[misc]

    def __reduce__(self) -> tuple[Any, ...]:
        """Its class is made anew where it arrives."""
        return _made, (self.plain, type(self).__bases__[0], Tones(self.plain))


class TabledPatches(Patched, Tabled):
    """Of a class that cuts pictures into patches."""


WAYS = (TabledPatches, Tabled)
"""What is tried before an image processor's class, the fastest first."""


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
    tried = (_made(processor, way, tones) for way in WAYS if way is Tabled or cuts_patches(processor))
    return next((made for made in tried if _alike(processor, made)), processor)


def _made(processor: Any, way: type, tones: Tones) -> Any:
    own = {"plain": processor, "tones": tones, "steps": steps_of(processor)}
    cls = type(processor)
    made: Any = object.__new__(type(cls.__name__, (way, cls, quicker_base()), own))
    made.__dict__ = processor.__dict__
    return made


def _has_usual_steps(processor: Any) -> bool:
    from transformers.image_processing_backends import PilBackend

    return all(getattr(type(processor), step) is getattr(PilBackend, step) for step in STEPS)


def _alike(processor: Any, other: Any) -> bool:
    """Whether both make the same of pictures, to the bit. False where it cannot be told."""
    try:
        made = [[dict(each([picture], return_tensors="pt")) for each in (processor, other)] for picture in noise()]
    except (ValueError, ZeroDivisionError, IndexError):  # as processors refuse pictures of some shapes
        return False
    return all(_same(wanted, found) for wanted, found in made)


def _same(wanted: dict[str, Any], found: dict[str, Any]) -> bool:
    return wanted.keys() == found.keys() and all(
        type(wanted[name]) is type(found[name]) and np.array_equal(wanted[name], found[name]) for name in wanted
    )
