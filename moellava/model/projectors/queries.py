# SPDX-License-Identifier: Apache-2.0
"""Projectors whose learnt queries read the tower's features: one token each, however many features there are."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2MLP, Idefics2PerceiverResampler

from moellava.model.projectors.entry import PROJECTORS, Projector, Sizes, mlp, same_name

MOST_HEADS = 32
MLP_RATIO = 2.6875
"""Of MoE-LLaVA's Q-Former: its heads, and its inner width as a multiple of its width."""

DEVIATION = 0.02
"""Of new queries. They must differ: equal ones would get equal gradients and stay equal for ever."""


class QFormer(nn.Module):
    """MoE-LLaVA's `Blip2Model`: two layers, Hugging Face's BLIP-2 Q-Former with cross-attention everywhere, two layers.

    Args:
        sizes: what it stands between.
        layers: of the Q-Former.
        queries: tokens that come out.
    """

    def __init__(self, sizes: Sizes, layers: int, queries: int):
        super().__init__()
        width = sizes.out_features
        self.proj_in = mlp(sizes.in_features, width, 2)
        self.query_tokens = nn.Parameter(DEVIATION * torch.randn(1, queries, width))
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=width,
                encoder_hidden_size=width,
                intermediate_size=int(width * MLP_RATIO),
                num_hidden_layers=layers,
                num_attention_heads=math.gcd(MOST_HEADS, width),
                cross_attention_frequency=1,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )
        self.proj_out = mlp(width, width, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, N, in_features] -> [B, queries, out_features]."""
        queries = self.query_tokens.expand(len(features), -1, -1)
        read = self.qformer(query_embeds=queries, encoder_hidden_states=self.proj_in(features))
        return self.proj_out(read.last_hidden_state)


class Resampler(nn.Module):
    """Hugging Face's Idefics2 connector: a gated MLP to the language model's width, then the perceiver resampler.

    Args:
        sizes: what it stands between.
        layers: of the resampler.
        queries: tokens that come out.
    """

    def __init__(self, sizes: Sizes, layers: int, queries: int):
        super().__init__()
        width = sizes.out_features
        self.modality_projection = Idefics2MLP(sizes.in_features, width, width, "silu")
        self.perceiver_resampler = Idefics2PerceiverResampler(
            Idefics2PerceiverConfig(hidden_size=width, resampler_n_latents=queries, resampler_depth=layers)
        )
        nn.init.normal_(self.perceiver_resampler.latents, std=DEVIATION)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, N, in_features] -> [B, queries, out_features]."""
        mask = torch.ones(features.shape[:2], dtype=torch.long, device=features.device)
        return self.perceiver_resampler(context=self.modality_projection(features), attention_mask=mask)


def one_per_query(sizes: Sizes, layers: int, queries: int) -> int:
    """Each query becomes one embedding."""
    return queries


PROJECTORS.register("qformerN_Q", Projector(QFormer, one_per_query, to_published=same_name))
PROJECTORS.register("resamplerN_Q", Projector(Resampler, one_per_query))
