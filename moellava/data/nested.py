# SPDX-License-Identifier: Apache-2.0
"""Batches in which all pictures of a sample stand in one row of a tensor, and a sample that shows less is filled up.

    pixel_values      [samples, tiles, 3, H, W]              SmolVLM, Idefics 3: one picture's tiles behind another's
                      [samples, pictures, tiles, 3, H, W]    Llama 3.2 Vision: tiles that a picture lacks are zeros
    aspect_ratio_ids  [samples, pictures]

What such a row is made of, a *unit*, is a picture's share of it: [tiles, 3, H, W], [1, tiles, 3, H, W], [1]. A video is
a row by itself. Where a model reads images and videos as one input, and a batch has both, all of them are one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

Unit = dict[str, Tensor]
"""A picture's share of each input of the model, [n, …]."""


class Rows:
    """How a processor fills rows, found out by having it read a sample of one picture beside one of two.

    Args:
        inputs: what it made of them.
        pixels: which of them holds pixels.

    Raises:
        ValueError: a sample is no row.
    """

    def __init__(self, inputs: Unit, pixels: str):
        if any(len(value) != 2 or value.ndim < 2 for value in inputs.values()):
            raise ValueError("the inputs of two samples are not two rows each")
        self.fills = {name: value[0, -1].clone() for name, value in inputs.items()}
        self.tiles = inputs[pixels].shape[2] if inputs[pixels].ndim == 6 else None
        """Of a picture, where pictures have an axis of their own."""

    def groups(self, samples: Sequence[Sequence[Any]], is_one_input: bool) -> list[list[list[Any]]]:
        """What samples show, row by row: those of images, and those of videos.

        Args:
            samples: what they show; each begins with its modality.
            is_one_input: whether the model reads both as one input: a batch that has both is one row of all.
        """
        images = [[one for one in sample if one[0] == "image"] for sample in samples]
        videos = [[one] for sample in samples for one in sample if one[0] == "video"]
        by_modality = [[row for row in images if row], videos]
        if all(by_modality) and is_one_input:
            return [[list(chain.from_iterable(samples))]]
        return [rows for rows in by_modality if rows]

    def beside(self, rows: Sequence[Sequence[Unit]]) -> Unit:
        """All inputs but pixels."""
        shares = {name: [[unit[name] for unit in row] for row in rows] for name in rows[0][0]}
        return {name: stacked(groups, self.fills.get(name, 0)) for name, groups in shares.items()}

    def pixels(self, rows: Sequence[Sequence[Tensor]], shown: Callable[[Tensor], Tensor]) -> Tensor:
        """Pixels of pictures, of what is kept of each, [tiles, …]; `shown` makes pixels of it."""
        made = stacked(rows, 0, shown, self.tiles)
        return made if self.tiles is None else made.unflatten(1, (-1, self.tiles))


def stacked(
    groups: Sequence[Sequence[Tensor]],
    fill: Any,
    shown: Callable[[Tensor], Tensor] = lambda one: one,
    span: int | None = None,
) -> Tensor:
    """[G, R, …] of G groups of tensors [r, …], each group's one behind the other.

    Args:
        groups: of tensors; none is empty.
        fill: what stands where a group has less than the longest.
        shown: makes of a tensor what stands there. One at a time, so that its memory is used again by the next.
        span: places of each tensor, if it has less of its own: the others are filled.
    """
    lengths = [sum(span or len(one) for one in group) for group in groups]
    first = shown(groups[0][0][:1])
    made = first.new_empty(len(groups), max(lengths), *first.shape[1:])
    for row, group, length in zip(made, groups, lengths, strict=True):
        begin = 0
        for one in group:
            end = begin + len(one)
            row[begin:end] = shown(one)
            begin = begin + span if span else end
            row[end:begin] = fill
        row[length:] = fill
    return made


def thrifty(value: Tensor) -> Tensor:
    """The same tensor, one number in memory where all of its are equal: a mask of a picture's pixels is megabytes."""
    first = value.flatten()[:1].clone()
    return first.expand(value.shape) if bool((value == first).all()) else value


def tiles_shown(pixels: Tensor) -> Tensor:
    """[N, t, 3, H, W] of pictures of one size [N, T, 3, H, W], without those last tiles that are zeros in all."""
    shown = pixels.flatten(2).any(2).any(0).nonzero()
    return pixels[:, : int(shown.max()) + 1 if len(shown) else 1]
