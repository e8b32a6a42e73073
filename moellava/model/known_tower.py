# SPDX-License-Identifier: Apache-2.0
"""A tower that hands on features that are known, and computes the others.

LLaVA's classes ask their tower for hidden states and read one layer of them. A picture of one channel, [N, 1, P, D], is
no picture: it is that layer, [N, P, D], of N pictures, as the tower gave it before.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from moellava.errors import UserError
from moellava.model.tiles import LAYOUTS

FLAG = "--cache_features"


class KnowsFeatures:
    """Mixed into the class of a tower.

    Attributes:
        layer: index of the hidden states that are read.
    """

    layer: int

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the tower's own; of features [N, 1, P, D], an output that holds them where they are read."""
        if pixel_values.shape[1] != 1:
            return super().forward(pixel_values, *args, **kwargs)  # type: ignore[misc]
        return BaseModelOutputWithPooling(hidden_states=placed(pixel_values[:, 0], self.layer))


def placed(features: Tensor, layer: int) -> Any:
    """Hidden states of which one layer is known."""
    others = [None] * (layer if layer >= 0 else -layer - 1)
    return (*others, features) if layer >= 0 else (features, *others)


def tower_of(model: Any) -> Any:
    """The tower of a model whose class takes features in place of pixels.

    Raises:
        UserError: the class has another way from pixels to the language model, or reads several layers.
    """
    config, tower = model.config, getattr(model.base_model, "vision_tower", None)
    configs = tuple(layout.config for layout in LAYOUTS.values())
    if not isinstance(config, configs) or not isinstance(tower, nn.Module):
        names = ", ".join(one.__name__.removesuffix("Config") for one in configs)
        raise UserError(
            f"{FLAG}: a {type(model).__name__} does not take features in place of pixels, as {names} do. Leave the "
            "flag out."
        )
    if not isinstance(config.vision_feature_layer, int):
        raise UserError(f"{FLAG}: the model reads several layers of its tower, {config.vision_feature_layer}.")
    return tower


def knows_features(tower: Any, layer: int) -> None:
    """Has a tower hand on features that are known. Its parameters, their names and its hooks stay."""
    own = type(tower)
    tower.__class__ = type(own.__name__, (KnowsFeatures, own), {"layer": layer, "__module__": own.__module__})


def features_of(tower: Any, layer: int, pixels: Tensor) -> Tensor:
    """[N, P, D] of pixels [N, 3, H, W]: what LLaVA's classes read of a tower."""
    return tower(pixels, return_dict=True, output_hidden_states=True).hidden_states[layer]


def digest_of_weights(module: nn.Module) -> str:
    """Of all tensors of a module, with their names, shapes and dtypes. Collective where they are sharded."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
