# SPDX-License-Identifier: Apache-2.0
"""Experts that are different fine-tunes of one model (Branch-Train-MiX, arXiv:2403.07816), and the routers for them.

Each source's MLPs become one expert of every sparse layer. What is not an expert (attention, embeddings, vision, and
the MLPs of dense layers) is the mean of the sources'. A router starts as the linear map that tells the sources' tokens
apart best: ridge regression from what reaches a layer when source i's experts answer on data of source i, to the i-th
unit vector. Image and text tokens of a source count alike as a whole, and so do sources.

Legend: T tokens, D hidden, S sources, that is experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moellava.errors import UserError
from moellava.moe.interventions import forced, one_set
from moellava.moe.layer import NativeMoE
from moellava.moe.upcycle import moe_layers

CONFIDENCE = 0.9
"""Gate that a token gets for its own source, of two, where the regression tells it apart without error."""

RIDGE = 1e-3
"""Weight of the squared norm, as a fraction of the mean squared feature."""


class Moments:
    """Second moments of what reaches a layer, from which its router follows.

    Args:
        hidden: D.
        sources: S.

    Attributes:
        square_DD: Σ weight × x xᵀ.
        cross_SD: row i: Σ over tokens of source i of weight × x.
    """

    def __init__(self, hidden: int, sources: int):
        self.square_DD = torch.zeros(hidden, hidden, dtype=torch.float64)
        self.cross_SD = torch.zeros(sources, hidden, dtype=torch.float64)

    def add(self, x_TD: Tensor, source: int, weight: float) -> None:
        """Counts tokens of a source."""
        x_TD = x_TD.double().cpu()
        self.square_DD += weight * x_TD.t() @ x_TD
        self.cross_SD[source] += weight * x_TD.sum(0)

    def router(self) -> Tensor:
        """Rows [S, D] in fp32 of a router that sends tokens to the source they look like."""
        size = len(self.square_DD)
        ridge = RIDGE * self.square_DD.trace() / size * torch.eye(size, dtype=torch.float64)
        rows_SD = torch.linalg.solve(self.square_DD + ridge, self.cross_SD.t()).t()
        return (math.log(CONFIDENCE / (1 - CONFIDENCE)) * rows_SD).float()


@torch.no_grad()
def start_routers(model: Any, data: Sequence[Iterable[dict[str, Tensor]]], image_ids: Sequence[int]) -> None:
    """Sets the routers of a mixed model from its sources' own data.

    Args:
        model: of S experts in each sparse layer, in evaluation mode.
        data: for each source, batches of inputs with an attention mask.
        image_ids: ids of image and video tokens.

    Raises:
        UserError: a source has no data.
    """
    layers = [layer for _, layer in moe_layers(model)]
    moments = [Moments(layer.hidden, len(data)) for layer in layers]
    for source, batches in enumerate(data):
        own, count = [Moments(layer.hidden, len(data)) for layer in layers], 0
        with forced(model, source), _inputs(model) as seen:
            for batch in batches:
                count += 1
                seen.clear()
                model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
                for chosen_BL, weight in _weighed(batch, image_ids):
                    for one, x_BLD in zip(own, seen, strict=True):
                        one.add(x_BLD[chosen_BL], source, weight)
        if not count:
            raise UserError(f"Source {source} has no data: its tokens are what its expert's router row starts from.")
        for total, one in zip(moments, own, strict=True):
            total.square_DD += one.square_DD / count
            total.cross_SD += one.cross_SD / count
    for layer, found in zip(layers, moments, strict=True):
        layer.router.weight.copy_(found.router())


def _weighed(batch: dict[str, Tensor], image_ids: Sequence[int]) -> Iterator[tuple[Tensor, float]]:
    """Image and text tokens of a batch, as masks [B, L], with what each token counts: 1 for the batch in all."""
    image_BL = torch.isin(batch["input_ids"], batch["input_ids"].new_tensor(list(image_ids)))
    masks = [batch["attention_mask"].bool() & part_BL for part_BL in (image_BL, ~image_BL)]
    present = [(mask, int(mask.sum())) for mask in masks if mask.any()]
    yield from ((mask, 1 / (count * len(present))) for mask, count in present)


@contextmanager
def _inputs(model: Any) -> Iterator[list[Tensor]]:
    """What reaches the sparse layers in a forward inside, in their order; whoever reads it clears it."""
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])) for _, layer in moe_layers(model)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def take_expert(layer: NativeMoE, source: int, mlp: nn.Module, tokens: int = 16) -> float:
    """Makes a source's MLP expert number `source` of a layer. Returns the largest difference between the MLP's output
    and the layer's where all tokens visit that expert, on random tokens."""
    layer.experts[source].load_state_dict(mlp.state_dict())
    weight = next(mlp.parameters())
    x_TD = torch.randn(tokens, layer.hidden, generator=torch.Generator().manual_seed(source)).to(weight)
    return float((one_set(layer, source)(x_TD) - mlp(x_TD)).abs().max())
