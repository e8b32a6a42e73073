# SPDX-License-Identifier: Apache-2.0
"""Pixels as an image processor's last steps leave them, and the tones of 8 bits that they come from.

Rescaling and normalising look at a pixel's channel and tone alone, so that 3 × 256 numbers say all of it, which the
processor has filled itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

BLOCK = 100_000
"""Tones that are looked up at a time, so that their places in the table stay in the machine's cache."""


class Tones:
    """What becomes of each tone of each channel.

    Args:
        processor: an image processor of transformers that works through NumPy.
    """

    def __init__(self, processor: Any):
        tones = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
        if processor.do_rescale:
            tones = processor.rescale(tones, processor.rescale_factor)
        if processor.do_normalize:
            tones = processor.normalize(tones, processor.image_mean, processor.image_std)
        self.table = np.ascontiguousarray(tones[:, 0])

    def pixels(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        """[N, 3, H, W] of pictures in tones, uint8 [3, H, W] each."""
        made = np.empty((len(pictures), *pictures[0].shape), self.table.dtype)
        for picture, place in zip(pictures, made, strict=True):
            for plane, tones, out in zip(picture, self.table, place, strict=True):
                np.take(tones, plane, out=out, mode="clip")
        return torch.from_numpy(made)

    def patches(self, patches: np.ndarray) -> torch.Tensor:
        """The same of tones [N, 3, H, W] all at a time, where a picture is many patches."""
        return self.repeated(patches.reshape(len(patches), 3, -1), 1).reshape(patches.shape)

    def repeated(self, patches: np.ndarray, times: int) -> torch.Tensor:
        """[N, 3 · t · P] of patches in tones [N, 3, P], each channel so many times.

        Tones are looked up two at a time, as numbers of 16 bits, where P is even.
        """
        rows, channels, pixels = patches.shape
        in_pairs = pixels % 2 == 0 and self.table.dtype == np.float32
        tables, given = (self._pairs, patches.view(np.uint16)) if in_pairs else (self.table, patches)
        made = np.empty((rows, channels, times, given.shape[2]), tables.dtype)
        step = max(1, BLOCK // max(1, pixels))
        for begin in range(0, rows, step):
            block = slice(begin, begin + step)
            for channel, tones in enumerate(tables):
                made[block, channel] = np.take(tones, given[block, channel], mode="clip")[:, None]
        return torch.from_numpy(made.view(self.table.dtype).reshape(rows, -1))

    @functools.cached_property
    def _pairs(self) -> np.ndarray:
        """What becomes of two tones in a row, [3, 65536] of two numbers each."""
        both = np.arange(2**16, dtype=np.uint16).view(np.uint8).reshape(-1, 2)
        return np.take(self.table, both, axis=1).view(np.float64)[..., 0]

    def of(self, pixels: torch.Tensor) -> torch.Tensor | None:
        """The tones, uint8, of pixels [N, 3, H, W]; None: not every pixel is one."""
        first, last = self.table[:, 0], self.table[:, -1]
        if pixels.shape[1] != 3 or (first == last).any():
            return None
        slope = 255 / (last - first).astype(np.float64)
        tones = (pixels.numpy() - first[:, None, None]) * slope[:, None, None]
        coded = np.rint(np.nan_to_num(tones).clip(0, 255)).astype(np.uint8)
        return torch.from_numpy(coded) if torch.equal(self.pixels(coded), pixels) else None


def tones_of(processor: Any) -> Tones | None:
    """Those of an image processor; None: it has no such steps of its own."""
    from transformers.image_processing_backends import PilBackend

    plain = isinstance(processor, PilBackend) and processor.do_convert_rgb is not False
    return Tones(processor) if plain and (processor.do_rescale or processor.do_normalize) else None
