# SPDX-License-Identifier: Apache-2.0
"""Where the tokens of an image lie in it: rows and columns, found out from the run itself.

    a square           576 tokens                                  24 rows of 24
    rows               w tokens, a break, w tokens, a break …      Pixtral
    named tiles        <row_1_col_2> s² tokens …                   Idefics 3, SmolVLM
    a stated grid      grid_thw / merge²                           Qwen2-VL and its like
    tiles, unpadded    s² tokens, then h rows of w and a newline   LLaVA-1.6, OneVision
    tiles in a row     m × s² tokens                               InternVL

What is none of these is no grid, which is said, and drawn as a row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

TILE = re.compile(r"<row_(\d+)_col_(\d+)>")
"""What names a tile in the text between tokens of an image."""

WHOLE = (0.0, 0.0, 1.0, 1.0)
"""The box of all of a picture: left, top, right, bottom, as fractions of its sides."""

SAME_SHAPE = 0.25
"""How far a grid's aspect ratio may be from the picture's, as a fraction: what is unpadded is rounded to patches."""


class Grid(NamedTuple):
    """Rows and columns of tokens.

    Attributes:
        rows, columns: their numbers.
        first: the first token's place in the run.
        pitch: tokens from one row's begin to the next one's.
        box: the part of the picture that it covers; None: not known.
        name: which part of the image this is.
    """

    rows: int
    columns: int
    first: int
    pitch: int
    box: tuple[float, float, float, float] | None = WHOLE
    name: str = "the whole"

    def places(self) -> list[tuple[int, int, int]]:
        """(place in the run, row, column) of each token."""
        return [
            (self.first + row * self.pitch + column, row, column)
            for row in range(self.rows)
            for column in range(self.columns)
        ]


class Stretch(NamedTuple):
    """Neighbouring tokens of an image in its run, and the text between them and those before."""

    first: int
    length: int
    before: str


@dataclass(frozen=True)
class Shown:
    """What is known of an image beside its run.

    Args:
        size: its width and height in pixels.
        frames: tokens as the model's inputs state them: times, rows and columns; None: they do not.
        shape: rows and columns of the tower's patches, where they are the same for every image.
        tile: tokens of an image that is one tile; None: every image has the same tokens.
        unpads: whether tiles are put together, and what pads the picture is taken off.
    """

    size: tuple[int, int]
    frames: tuple[int, int, int] | None = None
    shape: tuple[int, int] | None = None
    tile: int | None = None
    unpads: bool = False


def stretches_of(is_patch: Sequence[bool], texts: Sequence[str]) -> list[Stretch]:
    """The stretches of a run.

    Args:
        is_patch: whether each token is one of the image.
        texts: what each token reads.
    """
    found, place, before = [], 0, ""
    for inside, group in groupby(is_patch):
        length = len(list(group))
        if inside:
            found.append(Stretch(place, length, before))
        else:
            before = "".join(texts[place : place + length])
        place += length
    return found


def grids_of(stretches: Sequence[Stretch], shown: Shown) -> list[Grid]:
    """The grids of an image; empty where it is none."""
    return next((grids for layout in LAYOUTS if (grids := layout(stretches, shown))), [])


def _stated(stretches: Sequence[Stretch], shown: Shown) -> list[Grid]:
    if shown.frames is None:
        return []
    times, rows, columns = shown.frames
    names = ["the whole"] if times == 1 else [f"frame {number + 1} of {times}" for number in range(times)]
    if len(stretches) == 1 and stretches[0].length == times * rows * columns:
        starts = [stretches[0].first + number * rows * columns for number in range(times)]
    elif len(stretches) == times and all(one.length == rows * columns for one in stretches):
        starts = [one.first for one in stretches]
    else:
        return []
    return [Grid(rows, columns, start, columns, WHOLE, name) for start, name in zip(starts, names, strict=True)]


def _named_tiles(stretches: Sequence[Stretch], shown: Shown) -> list[Grid]:
    tiles = [TILE.search(one.before) for one in stretches]
    if not any(tiles):
        return []
    last_row = max(int(tile[1]) for tile in tiles if tile)
    last_column = max(int(tile[2]) for tile in tiles if tile)
    grids = []
    for one, tile in zip(stretches, tiles, strict=True):
        side = math.isqrt(one.length)
        if side * side != one.length:
            return []
        if tile is None:
            grids.append(Grid(side, side, one.first, side))
            continue
        row, column = int(tile[1]), int(tile[2])
        box = (column - 1) / last_column, (row - 1) / last_row, column / last_column, row / last_row
        grids.append(Grid(side, side, one.first, side, box, f"tile in row {row}, column {column}"))
    return grids


def _rows(stretches: Sequence[Stretch], shown: Shown) -> list[Grid]:
    lengths = {one.length for one in stretches}
    steps = {right.first - left.first for left, right in zip(stretches, stretches[1:], strict=False)}
    if len(stretches) < 2 or len(lengths) != 1 or len(steps) != 1:
        return []
    if not _is_like(len(stretches), lengths.pop(), shown.size):
        return []
    return [Grid(len(stretches), stretches[0].length, stretches[0].first, steps.pop())]


def _tower_shape(stretches: Sequence[Stretch], shown: Shown) -> list[Grid]:
    if shown.shape is None or len(stretches) != 1 or shown.tile is not None:
        return []
    rows, columns = shown.shape
    extra = stretches[0].length - rows * columns  # class and register tokens stand in front
    return [Grid(rows, columns, stretches[0].first + extra, columns)] if 0 <= extra <= rows else []


def _tiles(stretches: Sequence[Stretch], shown: Shown) -> list[Grid]:
    """One tile as a square; the whole and its tiles, put together and unpadded; or tiles in a row."""
    if len(stretches) != 1 or shown.tile is None:
        return []
    first, length, _ = stretches[0]
    side = math.isqrt(shown.tile)
    base = side * side
    if not 0 < base <= length or base != shown.tile:
        return []
    whole = Grid(side, side, first, side)
    if length in (base, base + 1):  # OneVision ends with a newline
        return [whole]
    fine = _unpadded(length - base, shown.size) if shown.unpads else None
    if fine is not None:
        rows, columns = fine
        return [whole, Grid(rows, columns, first + base, columns + 1, WHOLE, "its tiles")]
    if length % base:
        return []
    count = length // base
    names = [f"tile {number + 1} of {count}" for number in range(count)]
    return [Grid(side, side, first + number * base, side, None, name) for number, name in enumerate(names)]


def _unpadded(length: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of tiles whose rows end with a newline: those nearest to the picture's aspect ratio."""
    splits = [(rows, length // rows - 1) for rows in range(1, length) if length % rows == 0 and length // rows > 1]
    fitting = [(_distance(rows, columns, size), rows, columns) for rows, columns in splits]
    fitting = [one for one in fitting if _is_like(*one[1:], size)]
    return min(fitting)[1:] if fitting else None


def _square(stretches: Sequence[Stretch], shown: Shown) -> list[Grid]:
    if len(stretches) != 1:
        return []
    first, length, _ = stretches[0]
    side = math.isqrt(length)
    if length < 2:
        return []  # images that are read beside the text leave one token in it
    if side * side == length:
        return [Grid(side, side, first, side)]
    return [Grid(side, side, first + 1, side)] if side * side == length - 1 and side > 1 else []


def _distance(rows: int, columns: int, size: tuple[int, int]) -> float:
    """How far a grid's aspect ratio is from a picture's."""
    return abs(math.log(columns / rows * size[1] / size[0]))


def _is_like(rows: int, columns: int, size: tuple[int, int]) -> bool:
    # A side that is a few tokens long may be off by half a token.
    return _distance(rows, columns, size) < SAME_SHAPE + 0.5 / min(rows, columns)


LAYOUTS: tuple[Callable[[Sequence[Stretch], Shown], list[Grid]], ...] = (
    *(_stated, _named_tiles, _rows, _tower_shape, _tiles, _square),
)
"""In this order: the first that fits says where the tokens are."""
