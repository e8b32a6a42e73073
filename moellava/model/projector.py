"""Projectors from the tower's features to the language model's embeddings, laid out as Hugging Face's LLaVA has them.

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
from dataclasses import dataclass

import torch
from torch import nn

from moellava.errors import UnknownNameError, UserError

KNOWN = "linear, identity, mlpNx_gelu (N layers, for instance mlp2x_gelu)"


@dataclass(frozen=True)
class ProjectorSpec:
    """What a projector's name says.

    Args:
        name: as given.
        layers: linear layers that learn (0 for `identity`).
    """

    name: str
    layers: int

    @property
    def activation(self) -> str:
        """Hugging Face's `projector_hidden_act`."""
        return "gelu" if self.layers > 1 else "linear"

    @property
    def is_deep(self) -> bool:
        """Whether Hugging Face's own class lacks it."""
        return self.layers > 2


def parse_projector(name: str) -> ProjectorSpec:
    """Reads `--image_projector_type`. Raises UnknownNameError for a name that is not known, with those that are."""
    if name in ("identity", "linear"):
        return ProjectorSpec(name, 0 if name == "identity" else 1)
    match = re.fullmatch(r"mlp(\d+)x_gelu", name)
    if match is None or int(match[1]) < 1:
        raise UnknownNameError(f"Unknown projector {name!r}. Known: {KNOWN}")
    return ProjectorSpec(name, int(match[1]))


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


def check_widths(spec: ProjectorSpec, in_features: int, out_features: int) -> None:
    """Raises UserError where `identity` would have to change the width."""
    if spec.layers == 0 and in_features != out_features:
        raise UserError(
            f"--image_projector_type identity needs equal widths, but the tower gives {in_features} "
            f"and the language model takes {out_features}. Use linear."
        )


def initial_weights(spec: ProjectorSpec, in_features: int, out_features: int) -> dict[str, torch.Tensor]:
    """A new projector's tensors, as LLaVA draws them (torch's default for linear layers, from the global seed).

    Args:
        in_features: width of the tower's features.
        out_features: width of the language model's embeddings.

    Returns:
        `linear_1.weight`, `linear_1.bias`, … as the composed model names them.
    """
    check_widths(spec, in_features, out_features)
    layers = {
        f"linear_{index}": nn.Linear(in_features if index == 1 else out_features, out_features)
        for index in range(1, spec.layers + 1)
    }
    return nn.ModuleDict(layers).state_dict() | identities(spec, out_features)


def identities(spec: ProjectorSpec, features: int) -> dict[str, torch.Tensor]:
    """The tensors of the layers that this projector does not have and Hugging Face's class does."""
    layers = {f"linear_{index}": FixedIdentity(features) for index in range(spec.layers + 1, 3)}
    return nn.ModuleDict(layers).state_dict()


def pin_identities(projector: nn.Module, spec: ProjectorSpec) -> None:
    """Puts `FixedIdentity` where this projector has no layer. Raises UserError if a matrix there is not one."""
    for index in range(spec.layers + 1, 3):
        layer = getattr(projector, f"linear_{index}")
        identity = FixedIdentity(layer.out_features, layer.weight.device, layer.weight.dtype)
        if not torch.equal(layer.weight, identity.weight) or layer.bias.any():
            raise UserError(
                f"The config says that the projector is {spec.name!r}, but its linear_{index} is not the identity: "
                "config.json and the weights do not belong together."
            )
        setattr(projector, f"linear_{index}", identity)


def to_published(key: str, spec: ProjectorSpec) -> str:
    """Our projector key -> the reference's inside `image_spatial_proj` (`linear_2.bias` -> `2.bias`)."""
    layer, name = key.removeprefix("linear_").split(".")
    return name if spec.name == "linear" else f"{2 * (int(layer) - 1)}.{name}"


def from_published(key: str) -> str:
    """The reference's key in `image_spatial_proj` -> ours (`2.bias` -> `linear_2.bias`, `bias` -> `linear_1.bias`)."""
    layer, _, name = key.rpartition(".")
    return f"linear_{int(layer or 0) // 2 + 1}.{name}"
