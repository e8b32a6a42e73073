# SPDX-License-Identifier: Apache-2.0
"""Projectors that convolve over the grid of patches and give fewer tokens."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm

from moellava.errors import UserError
from moellava.model.projectors.entry import PROJECTORS, Projector, Sizes, as_grid, as_row, grid_side, halved, mlp

SQUEEZE = 4
"""Channels of a block over those between its squeeze and its excitation."""

MOST_GROUPS = 32
"""Of MoE-LLaVA's group norm."""


class Bottleneck(nn.Module):
    """RegNet's block as Honeybee uses it: 1 × 1, depthwise 3 × 3, squeeze and excite, 1 × 1, with layer norms and SiLU.

    Args:
        width: channels.
    """

    def __init__(self, width: int):
        super().__init__()
        inner = max(width // SQUEEZE, 1)
        self.conv1, self.norm1 = nn.Conv2d(width, width, 1, bias=False), channel_norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm2 = channel_norm(width)
        self.squeeze, self.excite = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)
        self.conv3, self.norm3 = nn.Conv2d(width, width, 1, bias=False), channel_norm(width)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """[B, width, H, W] -> the same."""
        hidden = functional.silu(self.norm1(self.conv1(grid)))
        hidden = functional.silu(self.norm2(self.conv2(hidden)))
        gate = self.excite(functional.silu(self.squeeze(hidden.mean((2, 3), keepdim=True))))
        return functional.silu(grid + self.norm3(self.conv3(hidden * gate.sigmoid())))


def channel_norm(width: int) -> nn.Module:
    """A layer norm over the channels of [B, width, H, W]."""
    return ConvNextLayerNorm(width, data_format="channels_first")


class CAbstractor(nn.Module):
    """Honeybee's C-Abstractor (arXiv:2312.06742, 3.2): blocks, adaptive average pooling, blocks, two layers with SiLU.

    Args:
        sizes: what it stands between.
        blocks: on either side of the pooling.
        queries: tokens that come out, a square number.
    """

    def __init__(self, sizes: Sizes, blocks: int, queries: int):
        super().__init__()
        width, out = sizes.in_features, sizes.out_features
        self.side = math.isqrt(queries)
        self.pos_emb = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, sizes.tokens, width), std=0.02))
        self.before = nn.Sequential(*(Bottleneck(width) for _ in range(blocks)))
        self.after = nn.Sequential(*(Bottleneck(width) for _ in range(blocks)))
        self.readout = nn.Sequential(nn.Linear(width, out), nn.SiLU(), nn.Linear(out, out))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, N, in_features] -> [B, queries, out_features]."""
        grid = self.before(as_grid(features + self.pos_emb))
        return self.readout(as_row(self.after(functional.adaptive_avg_pool2d(grid, self.side))))


class ConvBlock(nn.Module):
    """MoE-LLaVA's `BaseConv2D`: a group norm, a 3 × 3 convolution and GELU, beside the way past them.

    Args:
        width: channels.
    """

    def __init__(self, width: int):
        super().__init__()
        norm = nn.GroupNorm(math.gcd(MOST_GROUPS, width), width, eps=1e-6)
        self.conv = nn.Sequential(norm, nn.Conv2d(width, width, 3, padding=1), nn.GELU())

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """[B, width, H, W] -> the same."""
        return grid + self.conv(grid)


class CBlock(nn.Module):
    """Two layers, the mean of 2 × 2 patches, convolutional blocks, two layers: MoE-LLaVA's without its attention.

    Args:
        sizes: what it stands between.
        blocks: after the pooling.
    """

    def __init__(self, sizes: Sizes, blocks: int):
        super().__init__()
        width = sizes.out_features
        self.proj_in = mlp(sizes.in_features, width, 2)
        self.blocks = nn.Sequential(*(ConvBlock(width) for _ in range(blocks)))
        self.proj_out = mlp(width, width, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, N, in_features] -> [B, N / 4, out_features]."""
        grid = functional.avg_pool2d(as_grid(self.proj_in(features)), 2)
        return self.proj_out(as_row(self.blocks(grid)))


def pooled_to(sizes: Sizes, blocks: int, queries: int) -> int:
    """A square of `queries` tokens. Raises UserError where it is none, or finer than the tower's grid."""
    side, wanted = grid_side(sizes), math.isqrt(queries)
    if wanted**2 != queries:
        raise UserError(
            f"pools to a square grid, which {queries} tokens do not fill: take {wanted**2} or {(wanted + 1) ** 2}."
        )
    if wanted > side:
        raise UserError(
            f"pools to a grid of {wanted} × {wanted}, but the tower gives {side} × {side}: take {side**2} or fewer."
        )
    return queries


PROJECTORS.register("cabstractorN_Q", Projector(CAbstractor, pooled_to))
PROJECTORS.register("cblockN", Projector(CBlock, halved))
