# SPDX-License-Identifier: Apache-2.0
"""Projectors that are linear layers, laid out as Hugging Face's LLaVA has them.

Hugging Face's projector is two linear layers around an activation. `mlp2x_gelu` is just that. `linear` and `identity`
are that as well, exactly, with no activation and the identity matrix in the layers that are not there:

    name        linear_1     activation   linear_2
    mlp2x_gelu  learns       gelu         learns
    linear      learns       none         identity
    mlp1x_gelu  the same as linear
    identity    identity     none         identity
    mlpNx_gelu  N layers: `DeepProjector`, which plain Hugging Face lacks

So a folder with any of the upper ones opens without moellava. In our own process the identities are no parameters, so
that no optimizer finds them.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from moellava.errors import UserError
from moellava.model.projectors.entry import (
    HUGGING_FACE_LAYERS,
    PROJECTORS,
    Projector,
    ProjectorSpec,
    Sizes,
    same_tokens,
)

LAYER_KEY = re.compile(r"(?:(\d+)\.)?(weight|bias)")
"""The reference's name of a tensor where the projector is nothing but linear layers."""


class FixedIdentity(nn.Module):
    """A linear layer that is the identity: its matrix is stored, for Hugging Face's class to load, and never learns."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, features: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.in_features = self.out_features = features
        self.register_buffer("weight", torch.eye(features, device=device, dtype=dtype))
        self.register_buffer("bias", torch.zeros(features, device=device, dtype=dtype))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, N, D] -> the same [B, N, D]."""
        return features


class DeepProjector(nn.Module):
    """`linear_1`, GELU, `linear_2`, GELU, … `linear_N`.

    Args:
        in_features: width of the tower's features.
        out_features: width of the language model's embeddings.
        layers: N.
    """

    def __init__(self, in_features: int, out_features: int, layers: int):
        super().__init__()
        self.layers = layers
        self.act = nn.GELU()
        for index in range(1, layers + 1):
            setattr(self, f"linear_{index}", nn.Linear(in_features if index == 1 else out_features, out_features))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, N, in_features] -> [B, N, out_features]."""
        for index in range(1, self.layers + 1):
            features = getattr(self, f"linear_{index}")(features if index == 1 else self.act(features))
        return features


def same_width(sizes: Sizes) -> int:
    """Tokens of `identity`. Raises UserError where it would have to change the width."""
    if sizes.in_features != sizes.out_features:
        raise UserError(
            f"needs equal widths, but the tower gives {sizes.in_features} and the language model takes "
            f"{sizes.out_features}. Use linear."
        )
    return sizes.tokens


def initial_weights(spec: ProjectorSpec, sizes: Sizes) -> dict[str, torch.Tensor]:
    """A new projector's tensors, as LLaVA draws them (torch's default for linear layers, from the global seed).

    Returns:
        `linear_1.weight`, `linear_1.bias`, … as the composed model names them.
    """
    return spec.module(sizes).state_dict() | identities(spec, sizes.out_features)


def fixed_layers(spec: ProjectorSpec) -> range:
    """Numbers of the layers that this projector does not have and Hugging Face's class does."""
    return range(0) if spec.layers is None else range(spec.layers + 1, HUGGING_FACE_LAYERS + 1)


def identities(spec: ProjectorSpec, features: int) -> dict[str, torch.Tensor]:
    """The tensors of the layers that this projector does not have and Hugging Face's class does."""
    layers = {f"linear_{index}": FixedIdentity(features) for index in fixed_layers(spec)}
    return nn.ModuleDict(layers).state_dict()


def pin_identities(projector: nn.Module, spec: ProjectorSpec) -> None:
    """Puts `FixedIdentity` where this projector has no layer. Raises UserError if a matrix there is not one."""
    for index in fixed_layers(spec):
        layer = getattr(projector, f"linear_{index}")
        identity = FixedIdentity(layer.out_features, layer.weight.device, layer.weight.dtype)
        if not torch.equal(layer.weight, identity.weight) or layer.bias.any():
            raise UserError(
                f"The config says that the projector is {spec.name!r}, but its linear_{index} is not the identity: "
                "config.json and the weights do not belong together."
            )
        setattr(projector, f"linear_{index}", identity)


def to_sequence(key: str) -> str:
    """Our projector key -> the reference's inside its `nn.Sequential` (`linear_2.bias` -> `2.bias`)."""
    layer, name = key.removeprefix("linear_").split(".")
    return f"{2 * (int(layer) - 1)}.{name}"


def to_single(key: str) -> str:
    """Our projector key -> that of the reference's one linear layer (`linear_1.bias` -> `bias`)."""
    return key.removeprefix("linear_1.")


def to_published(key: str, spec: ProjectorSpec) -> str | None:
    """Our projector key -> the reference's inside `image_spatial_proj`; None for a layer that it does not have.

    Raises:
        UserError: the reference has no such projector.
    """
    if spec.entry.to_published is None:
        raise UserError(f"This model's projector is {spec.name}, which the code of LLaVA and MoE-LLaVA lacks.")
    is_fixed = key.startswith(tuple(f"linear_{index}." for index in fixed_layers(spec)))
    return None if is_fixed else spec.entry.to_published(key)


def from_published(key: str) -> str:
    """The reference's key in `image_spatial_proj` -> ours (`2.bias` -> `linear_2.bias`, `bias` -> `linear_1.bias`).

    Projectors of more than linear layers are named here as there.
    """
    match = LAYER_KEY.fullmatch(key)
    return f"linear_{int(match[1] or 0) // 2 + 1}.{match[2]}" if match else key


def deep(sizes: Sizes, layers: int) -> DeepProjector:
    """`DeepProjector`, which for up to two layers holds just what learns in Hugging Face's."""
    return DeepProjector(sizes.in_features, sizes.out_features, layers)


PROJECTORS.register("linear", Projector(lambda sizes: deep(sizes, 1), same_tokens, lambda: 1, to_single))
PROJECTORS.register("identity", Projector(lambda sizes: deep(sizes, 0), same_width, lambda: 0, to_sequence))
PROJECTORS.register("mlpNx_gelu", Projector(deep, same_tokens, lambda layers: layers, to_sequence))
