# SPDX-License-Identifier: Apache-2.0
"""Where a decoder has its layers and their MLPs, found out without names where the names are not the usual ones.

A layer's MLP is the largest of its children that takes hidden states alone, gives as many back, and mixes no tokens:
three random tokens go in, and when the middle one changes, what comes out of the others stays.

Legend: D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moellava.errors import UserError
from moellava.moe.layer import RoutedMLP
from moellava.moe.mlp import has_usual_names

MLP = "mlp"
"""What most decoders call it."""

MIXED = 1e-3
"""From where on other tokens count as changed, as a fraction of the norm; the same product rounds the same."""

FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError)
"""What a module raises that wants more than hidden states."""


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder's layers: `layers` where it has them, else its largest list of modules. Raises UserError: none."""
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
        layers = max(lists, key=_size, default=None)
    if layers is None or not len(layers):
        raise UserError(f"{type(model).__name__} has no decoder layers to upcycle.")
    return layers


def mlp_names(model: Any, indices: Sequence[int]) -> dict[int, str]:
    """Layer index -> the attribute of that decoder layer which is its MLP. Raises UserError: see `mlp_name`."""
    layers, width = decoder_layers(model), model.get_input_embeddings().weight.shape[1]
    return {index: mlp_name(layers[index], width) for index in indices}


def mlp_name(layer: nn.Module, width: int) -> str:
    """The attribute of a decoder layer that is its MLP, dense or sparse.

    Args:
        width: D.

    Raises:
        UserError: no child of the layer is one.
    """
    routed = [name for name, child in layer.named_children() if isinstance(child, RoutedMLP)]
    if routed:
        return routed[0]
    usual = getattr(layer, MLP, None)
    if usual is not None and has_usual_names(usual) and (_is_empty(usual) or is_token_wise(usual, width)):
        return MLP
    if is_sparse(layer):
        raise UserError(
            f"A decoder layer is a {type(layer).__name__}, which has experts of its own: it is sparse already and "
            "needs no upcycling. Train it without --moe_enable. --moe_layers_idx names layers that are dense."
        )
    children = [(name, child) for name, child in layer.named_children() if _matrices(child) > 1]
    for name, child in sorted(children, key=lambda named: _size(named[1]), reverse=True):
        if is_token_wise(child, width):
            return name
    raise UserError(
        f"A decoder layer is a {type(layer).__name__}, and of its parts {_parts(layer)} none is a plain MLP, a module "
        "of two matrices or more that takes hidden states alone and mixes no tokens: it cannot be made into experts."
    )


def is_sparse(layer: nn.Module) -> bool:
    """Whether a decoder layer has experts of its own: matrices in a stack, or a list of MLPs."""
    convolutions = (nn.Conv1d, nn.Conv2d)
    stacked = any(
        parameter.dim() == 3
        for module in layer.modules()
        if not isinstance(module, convolutions)
        for parameter in module.parameters(recurse=False)
    )
    lists = [module for module in layer.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    return stacked or any(all(_matrices(expert) > 1 for expert in experts) for experts in lists)


def _matrices(module: nn.Module) -> int:
    return sum(parameter.dim() == 2 for parameter in module.parameters())


@torch.no_grad()
def is_token_wise(module: nn.Module, width: int) -> bool:
    """Whether a module turns tokens [N, D] into as many, each for itself."""
    module = at_hand(module)
    one = torch.randn(3, width, generator=torch.Generator().manual_seed(0), device="cpu").to(next(module.parameters()))
    other = one.clone()
    other[1] = one[0]
    try:
        outputs = [module(hidden) for hidden in (one, other)]
    except FAILURES:
        return False
    if any(not isinstance(output, Tensor) or output.shape != one.shape for output in outputs):
        return False
    first, second = (output.float() for output in outputs)
    moved = float((first - second)[::2].norm() / first.norm().clamp_min(1e-30))
    return moved < MIXED and not torch.equal(first[1], second[1])


def at_hand(module: nn.Module) -> nn.Module:
    """The module itself; a random copy of one that has no memory yet; in evaluation mode, so that it draws nothing."""
    if _is_empty(module):
        module = copy.deepcopy(module).to_empty(device="cpu").float()
        generator = torch.Generator().manual_seed(0)
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.data.normal_(std=max(tensor.shape[-1:], default=1) ** -0.5, generator=generator)
        return module.eval()
    return module if not module.training else copy.deepcopy(module).eval()


def _is_empty(module: nn.Module) -> bool:
    return next(module.parameters()).device.type == "meta"


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _parts(layer: nn.Module) -> str:
    return ", ".join(f"{name} ({type(child).__name__})" for name, child in layer.named_children())
