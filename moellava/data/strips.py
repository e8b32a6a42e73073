# SPDX-License-Identifier: Apache-2.0
"""Which columns of a padded picture have to be resized: those that the picture reaches, and no background beside it.

Pillow makes each column of the smaller image of a few columns of the larger one, by weights that depend on where these
lie. A strip of the larger image that begins and ends where columns of both meet has the same weights, but for the last
bits of a float, and Pillow rounds weights to 22 bits. So they are the same where none of them is close to the border
between two roundings; where one is, the whole image is resized.
"""

from __future__ import annotations

import functools
import math

import numpy as np

REACH = 2
"""Columns to each side of which bicubic interpolation makes one, at the scale of the smaller image."""

PRECISION = 22
"""Bits of Pillow's weights behind the point."""

CLOSE = 1e-5
"""How near to the border between two roundings, in units of the last bit, is too near: 20 times what floats are off."""


def strip_of(side: int, begin: int, end: int, columns: int) -> tuple[int, int]:
    """The columns (begin, end) of a square that have to be resized for one of `columns` columns by bicubic
    interpolation, so that columns of the larger and the smaller meet at both ends.

    Args:
        side: columns of the square.
        begin, end: those of the picture in it; the others are background.
        columns: of the smaller image.
    """
    step = side // math.gcd(side, columns)
    reach = math.ceil(2 * REACH * side / columns) + 1  # of a column that the picture reaches, all that it is made of
    left, right = max(begin - reach, 0) // step * step, min(-(-(end + reach) // step) * step, side)
    return (left, right) if side > columns and is_exact(side, columns) else (0, side)


@functools.lru_cache(maxsize=4096)
def is_exact(side: int, columns: int) -> bool:
    """Whether each of Pillow's weights is certain to be rounded in one way, wherever it is counted from."""
    scale = side / columns
    centre = (np.arange(columns)[:, None] + 0.5) * scale
    place = np.floor(centre - REACH * scale + 0.5) + np.arange(math.ceil(2 * REACH * scale) + 2)
    distance = np.abs((place - centre + 0.5) / scale)
    weights = np.where((place >= 0) & (place < side), _bicubic(distance), 0)
    in_bits = weights / weights.sum(1, keepdims=True) * 2**PRECISION
    return bool((np.abs(in_bits - np.floor(in_bits) - 0.5) > CLOSE).all())


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Pillow's, of distances."""
    return np.select([x < 1, x < 2], [(1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5], 0.0)
