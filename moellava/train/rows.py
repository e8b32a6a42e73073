# SPDX-License-Identifier: Apache-2.0
"""Dense MLPs of a decoder, and the end of its last attention, run over the rows that something reads.

    tokens            a   b   c   d   .   .      two positions of padding
    labels            .   .   .   d   .   .
    layers before     x   x   x   x              real tokens: no attention reads padding
    last layer                x                  the head reads position i where label i + 1 is trained

A layer's MLP is the larger part of it, and what it gives elsewhere is not read by anything: zeros stand there. So it is
with the linear at the end of the last layer's attention, unless experts follow it, whose router looks at all tokens.
What surrounds them keeps its shapes, and Hugging Face's forward stays as it is. Whether that is so for a model (and not
for one that scans padding, or goes through its layers twice) is found out on it, before its first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moellava.data.places import Places
from moellava.errors import UserError
from moellava.log import get_logger
from moellava.moe import moe_layers
from moellava.moe.decoder import MLP, decoder_layers
from moellava.moe.mlp import has_usual_names
from moellava.moe.modes import drops_rows, evaluating
from moellava.moe.own_routers import is_sparse
from moellava.processes import sum_over_processes
from moellava.train.loss import Supervised
from moellava.train.packing import OFF, distance

WORTH = 0.95
"""Rows are picked where they are at most so many of all: to copy them there and back takes time, too. Not so under
ZeRO-3, where all processes have to do the same: with activation checkpoints, when a layer is computed again in the
backward depends on whether its rows were picked, and with it the order in which its weights are gathered."""


ATTENTION, OUTPUTS = "self_attn", ("o_proj", "dense", "out_proj")
"""What decoders call a layer's attention, and the linear at its end."""


class NeededRows:
    """Narrows the inputs of modules from [B, L, D] to [1, N, D] while it is told of a batch.

    Args:
        model: a VLM; sparse layers pick their rows themselves.

    Attributes:
        is_exact: whether what the head reads stays the same; None: not known yet.
    """

    def __init__(self, model: Any):
        self.is_exact: bool | None = None
        self._always = False
        self._modules = [_Narrowed(module, is_last) for module, is_last in narrowable(model)]
        if not self._modules:
            self.is_exact = False

    def tell(self, places: Places, supervised: Supervised) -> None:
        """What the next forward holds, and a recomputation of it in its backward."""
        if self.is_exact is not False:
            for one in self._modules:
                place_N = supervised.place_N if one.is_last else places.real
                worth = self._always or len(place_N) <= WORTH * supervised.shape.numel()
                one.told = (place_N, supervised.shape) if worth else None

    def forget(self) -> None:
        """Whatever comes next is not known."""
        for one in self._modules:
            one.told = None

    @contextmanager
    def only_within(self) -> Iterator[None]:
        """What is told inside is forgotten behind it."""
        try:
            yield
        finally:
            self.forget()

    def begin(self, model: Any, seen: Callable[[], Tensor], places: Places, supervised: Supervised) -> None:
        """Tells of a batch; of the first one that has labels after a look at whether the model allows it. With many
        processes, on all: they agree, and some may have no labels.

        Args:
            model: as it is called, wrapped or not.
            seen: runs it on the batch, without gradient; what the head reads, [N, D].
        """
        if self.is_exact is None:
            self._always = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
            with evaluating(model):
                alike = self._looks_alike(seen, places, supervised)
            votes = torch.tensor([alike is True, alike is False], device=supervised.place_N.device).float()
            alikes, others = sum_over_processes(votes).tolist()
            self.is_exact = not others if alikes or others else None
            if others:
                get_logger().info("What the head reads depends on all positions of a batch: MLPs run over all of them.")
        if self.is_exact:
            self.tell(places, supervised)

    def _looks_alike(self, seen: Callable[[], Tensor], places: Places, supervised: Supervised) -> bool | None:
        """Whether the head reads the same of picked rows; None: it reads nothing of this batch."""
        wanted = seen().float()
        self.tell(places, supervised)
        with self.only_within():
            found = seen().float()
        dtype = next(self._modules[0].module.parameters()).dtype
        return distance(found, wanted) <= OFF.get(dtype, max(OFF.values())) if len(wanted) else None


class _Narrowed:
    """One module.

    Attributes:
        told: indices [N] among the positions [B, L] that it runs over, and that shape; None: over all.
    """

    def __init__(self, module: nn.Module, is_last: bool):
        self.module, self.is_last = module, is_last
        self.told: tuple[Tensor, torch.Size] | None = None
        self._narrows = False
        module.register_forward_pre_hook(self._pick)
        module.register_forward_hook(self._put_back)

    def _pick(self, module: nn.Module, inputs: tuple) -> tuple | None:
        hidden, *rest = inputs
        self._narrows = self.told is not None and hidden.shape[:-1] == self.told[1]
        if not self._narrows or self.told is None:
            return None
        return (hidden.flatten(0, 1).index_select(0, self.told[0]).unsqueeze(0), *rest)

    def _put_back(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        if not self._narrows or self.told is None:
            return None
        place_N, shape = self.told
        rows_ND = output.squeeze(0)
        all_TD = rows_ND.new_zeros(shape.numel(), rows_ND.shape[-1])
        return all_TD.index_copy(0, place_N, rows_ND).view(*shape, -1)


def narrowable(model: Any) -> list[tuple[nn.Module, bool]]:
    """Dense MLPs of a decoder and the end of its last attention, and whether each is in the last layer; none where
    padding counts, too.

    Modules that drop rows as a whole are left alone: theirs are others.
    """
    if any(layer.spec.router_balance == "first_choice" for _, layer in moe_layers(model)):
        return []  # its loss counts how padding is routed
    try:
        layers = decoder_layers(model)
    except (UserError, AttributeError):  # a decoder of another sort
        return []
    mlps = [(getattr(layer, MLP, None), layer is layers[-1]) for layer in layers]
    found = [(mlp, is_last) for mlp, is_last in mlps if mlp is not None and has_usual_names(mlp)]
    if found and found[-1][1] and not is_sparse(layers[-1]):  # a router there would see zeros, and count them
        attention = getattr(layers[-1], ATTENTION, None)
        ends = (getattr(attention, name, None) for name in OUTPUTS)
        found += [(end, True) for end in ends if isinstance(end, nn.Module)]
    return [(part, is_last) for part, is_last in found if not drops_rows(part)]
