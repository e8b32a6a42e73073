# SPDX-License-Identifier: Apache-2.0
"""A frozen tower runs the layers whose hidden states are read, and leaves no graph.

LLaVA reads the hidden states before a tower's last layer (`vision_feature_layer` -2). While such a tower is called, a
module that hands on what it gets stands in the place of every layer above; in between the tower is whole, for whoever
saves or exports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moellava.model.joined_towers import JoinedTowers
from moellava.model.probes import FAILURES
from moellava.model.tower_probes import CannotBeTowerError, random_images, side_of
from moellava.moe.modes import evaluating


class _Passes(nn.Module):
    """Stands for a layer, with its hooks: that of transformers counts the hidden states."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self._forward_hooks = layer._forward_hooks
        self._forward_hooks_with_kwargs = layer._forward_hooks_with_kwargs

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The same."""
        return hidden


class ShortTower:
    """A context: inside, the frozen tower of a composed model is called without what nothing reads.

    Args:
        model: the VLM. Where its tower trains, is spread over processes (ZeRO-3) or is not like that, nothing changes.
    """

    def __init__(self, model: Any):
        tower = getattr(getattr(model, "model", None), "vision_tower", None)
        read = getattr(model.config, "vision_feature_layer", None)
        self.is_inside, self._grad = False, True
        self._whole: list[tuple[nn.ModuleList, list[nn.Module]]] = []
        self._cut: list[tuple[nn.ModuleList, int]] = []
        if tower is None or read is None or any(p.requires_grad or hasattr(p, "ds_id") for p in tower.parameters()):
            return
        wanted = [read] if isinstance(read, int) else list(read)
        towers = tower.towers if isinstance(tower, JoinedTowers) else [tower]
        self._cut = [cut for one in towers if (cut := unread_layers(one, wanted)) is not None]
        tower.register_forward_pre_hook(self._shorten)
        tower.register_forward_hook(self._restore, always_call=True)

    @property
    def unread(self) -> int:
        """How many layers are left out."""
        return sum(len(layers) - kept for layers, kept in self._cut)

    def __enter__(self) -> ShortTower:
        self.is_inside = True
        return self

    def __exit__(self, *error: object) -> None:
        self.is_inside = False

    def _shorten(self, module: nn.Module, inputs: tuple) -> None:
        self._grad = torch.is_grad_enabled()
        if self.is_inside:
            torch.set_grad_enabled(False)
            self._whole = [(layers, leave_out(layers, kept)) for layers, kept in self._cut]

    def _restore(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        torch.set_grad_enabled(self._grad)
        put_back(self._whole)
        self._whole = []


def leave_out(layers: nn.ModuleList, kept: int) -> list[nn.Module]:
    """Layers from `kept` on hand on what they get; the list as it was."""
    whole = list(layers)
    for number in range(kept, len(whole)):
        layers[number] = _Passes(whole[number])
    return whole


def put_back(changed: Sequence[tuple[nn.ModuleList, list[nn.Module]]]) -> None:
    """Lists as they were."""
    for layers, whole in changed:
        for number, layer in enumerate(whole):
            layers[number] = layer


@torch.no_grad()
def unread_layers(tower: Any, read: Sequence[int]) -> tuple[nn.ModuleList, int] | None:
    """The layers of a tower, and how many of them give all that is read; None: all are needed, or it cannot be told.

    Args:
        read: indices of hidden states (0: embeddings; negative from the end).
    """
    count = getattr(tower.config, "num_hidden_layers", None)
    lists = [one for one in tower.modules() if isinstance(one, nn.ModuleList) and len(one) == count]
    if not count or len(lists) != 1:
        return None
    layers, kept = lists[0], max(index if index >= 0 else count + 1 + index for index in read)
    if not 0 <= kept < count:
        return None
    whole = list(layers)
    try:
        pixels = random_images(tower, side_of(tower.config))
        with evaluating(tower):
            wanted = tower(pixels, return_dict=True, output_hidden_states=True).hidden_states
            leave_out(layers, kept)
            found = tower(pixels, return_dict=True, output_hidden_states=True).hidden_states
        is_same = len(found) == len(wanted) and all(torch.equal(found[one], wanted[one]) for one in read)
    except (*FAILURES, CannotBeTowerError):  # it asks for more than pixels
        return None
    finally:
        put_back([(layers, whole)])
    return (layers, kept) if is_same else None
