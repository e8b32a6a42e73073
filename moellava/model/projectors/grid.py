# SPDX-License-Identifier: Apache-2.0
"""Projectors that join 2 × 2 patches of the grid into one token."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

from moellava.model.projectors.entry import PROJECTORS, Projector, Sizes, as_grid, as_row, halved, mlp, same_name


class PoolMLP(nn.Module):
    """MoE-LLaVA's `Pool_Block`: the mean of 2 × 2 patches, then linear layers with GELU between them.

    Args:
        sizes: what it stands between.
        layers: linear layers.
    """

    def __init__(self, sizes: Sizes, layers: int):
        super().__init__()
        self.block = mlp(sizes.in_features, sizes.out_features, layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, N, in_features] -> [B, N / 4, out_features]."""
        return self.block(as_row(functional.avg_pool2d(as_grid(features), 2)))


class PixelShuffle(InternVLMultiModalProjector):
    """InternVL's: 2 × 2 patches side by side in one of four times the width, a LayerNorm, two layers with GELU."""

    def __init__(self, sizes: Sizes):
        super().__init__(
            SimpleNamespace(
                vision_config=SimpleNamespace(hidden_size=sizes.in_features),
                text_config=SimpleNamespace(hidden_size=sizes.out_features),
                downsample_ratio=0.5,
                projector_hidden_act="gelu",
            )
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, N, in_features] -> [B, N / 4, out_features]."""
        grid = as_grid(features).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, D, H / 2, 2, W / 2, 2]
        joined = grid.permute(0, 2, 4, 3, 5, 1).flatten(3)  # [B, H / 2, W / 2, 4 · D], the patches row by row
        return super().forward(joined.flatten(1, 2))


PROJECTORS.register("pool_mlpNx_gelu", Projector(PoolMLP, halved, to_published=same_name))
PROJECTORS.register("pixel_shuffle", Projector(PixelShuffle, halved))
