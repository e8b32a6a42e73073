# SPDX-License-Identifier: Apache-2.0
"""What a projector is: an entry of `PROJECTORS` under the pattern of its name, and a name that has been read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from moellava.errors import UnknownNameError, UserError
from moellava.registry import Registry


class Sizes(NamedTuple):
    """What a projector stands between.

    Attributes:
        in_features: width of the tower's features.
        out_features: width of the language model's embeddings.
        tokens: features that the tower gives for one image.
    """

    in_features: int
    out_features: int
    tokens: int


def same_tokens(sizes: Sizes, *numbers: int) -> int:
    """Each feature becomes one embedding."""
    return sizes.tokens


def same_name(key: str) -> str:
    """Modules that are named as the reference's."""
    return key


@dataclass(frozen=True)
class Projector:
    """An entry. Its functions take the numbers of the name after the sizes.

    Args:
        module: (sizes, …) -> the module, [B, sizes.tokens, in_features] -> [B, tokens, out_features], freshly drawn.
        tokens: (sizes, …) -> embeddings of one image. Raises UserError, without the projector's name, where it does
            not fit the sizes.
        layers: (…) -> linear layers, where the projector is nothing else; None: it is something else.
        to_published: our tensor's name -> the reference's inside `image_spatial_proj`; None: the reference has no such
            projector.
    """

    module: Callable[..., nn.Module]
    tokens: Callable[..., int] = same_tokens
    layers: Callable[..., int] | None = None
    to_published: Callable[[str], str] | None = None


PROJECTORS: Registry[Projector] = Registry("projector")
"""Pattern of the name -> entry. The capitals N and Q of a pattern stand for numbers from 1 on."""

HUGGING_FACE_LAYERS = 2
"""Linear layers of the projector of Hugging Face's LLaVA."""


@dataclass(frozen=True)
class ProjectorSpec:
    """What a projector's name says.

    Args:
        name: as given.
        entry: of `PROJECTORS`.
        numbers: those in the name.
    """

    name: str
    entry: Projector
    numbers: tuple[int, ...]

    @property
    def layers(self) -> int | None:
        """Linear layers that learn (0 for `identity`); None for a projector that is more than linear layers."""
        return None if self.entry.layers is None else self.entry.layers(*self.numbers)

    @property
    def activation(self) -> str:
        """Hugging Face's `projector_hidden_act`."""
        return "linear" if self.layers in (0, 1) else "gelu"

    @property
    def is_extended(self) -> bool:
        """Whether Hugging Face's own class lacks it."""
        return self.layers is None or self.layers > HUGGING_FACE_LAYERS

    def module(self, sizes: Sizes) -> nn.Module:
        """The module, with weights drawn from the global seed; [B, N, in_features] -> [B, tokens, out_features]."""
        return self.entry.module(sizes, *self.numbers)

    def tokens(self, sizes: Sizes) -> int:
        """Embeddings that one image becomes. Raises UserError where the projector does not fit its neighbours."""
        try:
            return self.entry.tokens(sizes, *self.numbers)
        except UserError as error:
            raise UserError(f"--image_projector_type {self.name} {error}") from error


def parse_projector(name: str) -> ProjectorSpec:
    """Reads `--image_projector_type`. Raises UnknownNameError for a name or a number that no entry has."""
    known = f"Known: {', '.join(PROJECTORS)} (N, Q: numbers from 1 on, for instance mlp2x_gelu)"
    for pattern, entry in PROJECTORS.items():
        match = re.fullmatch(re.sub("[NQ]", "([0-9]+)", pattern), name)
        if match is None:
            continue
        if any(number.startswith("0") for number in match.groups()):
            raise UnknownNameError(f"Projector {name!r}: the numbers in {pattern} count from 1 on. {known}")
        return ProjectorSpec(name, entry, tuple(int(number) for number in match.groups()))
    raise UnknownNameError(f"Unknown projector {name!r}. {known}")


def grid_side(sizes: Sizes) -> int:
    """Patches along one side of the tower's square grid. Raises UserError where its tokens are no square."""
    side = math.isqrt(sizes.tokens)
    if side**2 != sizes.tokens:
        raise UserError(
            f"needs a square grid of patches, but the tower gives {sizes.tokens} tokens. Where one of them is the "
            "class token, leave it out: --mm_vision_select_feature patch."
        )
    return side


def as_grid(features: torch.Tensor) -> torch.Tensor:
    """[B, side · side, D] -> [B, D, side, side]."""
    side = math.isqrt(features.shape[1])
    return features.transpose(1, 2).unflatten(2, (side, side))


def as_row(grid: torch.Tensor) -> torch.Tensor:
    """[B, D, H, W] -> [B, H · W, D]."""
    return grid.flatten(2).transpose(1, 2)


def halved(sizes: Sizes, *numbers: int) -> int:
    """Tokens where 2 × 2 patches become one. Raises UserError where they do not divide the grid."""
    side = grid_side(sizes)
    if side % 2:
        raise UserError(
            f"joins 2 × 2 patches, but the tower gives a grid of {side} × {side}. Use a tower whose image_size holds "
            "an even number of patches."
        )
    return sizes.tokens // 4


def mlp(in_features: int, out_features: int, layers: int) -> nn.Sequential:
    """Linear layers with GELU between them, numbered as LLaVA's: 0, 2, 4 …"""
    modules: list[nn.Module] = [nn.Linear(in_features, out_features)]
    for _ in range(1, layers):
        modules += [nn.GELU(), nn.Linear(out_features, out_features)]
    return nn.Sequential(*modules)
