# SPDX-License-Identifier: Apache-2.0
"""Patches of pictures, cut while a pixel is one byte: rescaling and normalising are looked up when all else is done.

Qwen2-VL's image processor, and those that took over its layout, resize a picture, rescale and normalise it, and cut it
into patches that are shown once for each frame of a video's patch. It cuts floats, and copies all of them three times.
Here the same is done with 8-bit tones, a quarter of the bytes, and one frame:

    [3, H, W] tones  →  [patches, 3 · p · p] tones  →  [patches, 3 · t · p · p] pixels
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

SETTINGS = ("patch_size", "merge_size", "temporal_patch_size")
"""p, m and t: the sides of a patch and of a square of patches that stand together, and the frames of a patch."""

DECISIVE = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
"""Settings that decide over the tones."""


class Patched:
    """Before `Tabled`, for a class that cuts pictures by `patchify`. See `tabled`."""

    plain: Any
    tones: Any
    steps: tuple[Any, ...]

    def _preprocess(self, images: list[np.ndarray], **options: Any) -> Any:
        """As its class does it, with pixels for tones at the end."""
        usual = all(np.array_equal(options[name], getattr(self.plain, name)) for name in DECISIVE)
        if not usual or options["return_tensors"] != "pt" or any(image.dtype != np.uint8 for image in images):
            return self.plain._preprocess(images, **options)
        made = super()._preprocess(images, **options)  # type: ignore[misc]
        patches = made["pixel_values"].numpy()
        if patches.dtype == np.uint8:
            made["pixel_values"] = self.tones.repeated(patches.reshape(len(patches), 3, -1), options[SETTINGS[-1]])
        return made

    def normalize(self, image: np.ndarray, mean: Any, std: Any, **options: Any) -> np.ndarray:
        """An image of 8 bits as it is: `patchify` comes next."""
        if image.dtype == np.uint8 and self.plain.do_rescale and self.steps == steps_of(self.plain):
            return image
        return super().normalize(image, mean, std, **options)  # type: ignore[misc]

    def patchify(
        self, image: np.ndarray, patch_size: int, merge_size: int, temporal_patch_size: int
    ) -> tuple[np.ndarray, int, int]:
        """Tones of patches, [H / p · W / p, 3 · p · p], square after square, and how many stand below and beside each
        other."""
        if image.dtype != np.uint8:
            return super().patchify(image, patch_size, merge_size, temporal_patch_size)  # type: ignore[misc]
        high, wide = (side // patch_size for side in image.shape[1:])
        squares = image.reshape(
            3, high // merge_size, merge_size, patch_size, wide // merge_size, merge_size, patch_size
        )
        return squares.transpose(1, 4, 2, 5, 0, 3, 6).reshape(high * wide, -1), high, wide


def cuts_patches(processor: Any) -> bool:
    """Whether an image processor's class cuts pictures by a method of its own that is asked as Qwen2-VL's is."""
    patchify = getattr(type(processor), "patchify", None)
    return patchify is not None and tuple(inspect.signature(patchify).parameters) == ("self", "image", *SETTINGS)


def steps_of(processor: Any) -> tuple[Any, ...]:
    """What decides over the tones of an image processor."""
    return processor.rescale_factor, *np.ravel(processor.image_mean), *np.ravel(processor.image_std)
