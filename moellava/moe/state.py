# SPDX-License-Identifier: Apache-2.0
"""State dicts of sparse models in one naming: experts under their global index, whatever engine and ep_size ran.

A name of the native engine is `…mlp.experts.{e}.<part>`; the DeepSpeed engine's own is
`…mlp.deepspeed_moe.experts.deepspeed_experts.{local e}.<part>`. All other names are the same in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moellava.moe.layer import RoutedMLP

Keep = Callable[[Iterator[tuple[str, Tensor]]], dict[str, Tensor]]
"""What takes tensors by name as they arrive, and gives what is kept of them."""

NATIVE = "experts"
DEEPSPEED = "deepspeed_moe.experts.deepspeed_experts"


def named_sparse_layers(model: nn.Module) -> Iterator[tuple[str, RoutedMLP]]:
    """(name with a trailing dot, sparse layer) in order."""
    for name, module in model.named_modules():
        if isinstance(module, RoutedMLP):
            yield f"{name}." if name else "", module


def native_names(model: nn.Module) -> dict[str, str]:
    """This rank's name of each expert tensor that is called otherwise by the native engine -> the native name."""
    names = {}
    for prefix, layer in named_sparse_layers(model):
        if hasattr(layer, NATIVE):
            continue
        for local, (index, expert) in enumerate(layer.local_experts().items()):
            for part in expert.state_dict():
                names[f"{prefix}{DEEPSPEED}.{local}.{part}"] = f"{prefix}{NATIVE}.{index}.{part}"
    return names


def gather_moe_state_dict(model: nn.Module, keep: Keep = dict) -> dict[str, Tensor]:
    """The model's whole state dict with native names on rank 0; {} elsewhere.

    Collective when experts are spread over ranks: every rank must call it. With DeepSpeed, `model` is the engine's
    `module`, and its weights are those of the model's dtype (`train/deepspeed/portable.py` writes the fp32 ones).

    Args:
        model: dense or sparse.
        keep: called on rank 0 alone with the spread experts' tensors as they arrive, on the CPU; what it returns of
            them is in the result. Default: all of them, in memory.
    """
    names = native_names(model)
    state = {names.get(name, name): value for name, value in model.state_dict().items()}
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    if any(is_spread(layer) for _, layer in named_sparse_layers(model)):
        arriving = _spread_experts(model)
        if is_first:
            state |= keep(arriving)
        else:
            for _ in arriving:
                pass
    return state if is_first else {}


def is_spread(layer: RoutedMLP) -> bool:
    """Whether a layer's experts lie in several processes."""
    return getattr(layer, "ep_size", 1) > 1


def spread_shapes(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that `gather_moe_state_dict` hands to its `keep`, empty (meta)."""
    shapes: dict[str, Tensor] = {}
    for prefix, layer in named_sparse_layers(model):
        if is_spread(layer):
            one = next(iter(layer.local_experts().values())).state_dict()
            for index in range(layer.n_experts):
                empty = {part: torch.empty_like(value, device="meta") for part, value in one.items()}
                shapes |= {f"{prefix}{NATIVE}.{index}.{part}": value for part, value in empty.items()}
    return shapes


def _spread_experts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All spread experts' tensors one by one, by broadcasts within the expert groups."""
    for prefix, layer in named_sparse_layers(model):
        if not is_spread(layer):
            continue
        group, own = layer.deepspeed_moe.ep_group, list(layer.local_experts().values())
        for index in range(layer.n_experts):
            owner, local = divmod(index, len(own))
            for part, value in own[local].state_dict().items():
                # To the layer's device: quantised experts show their weights in the host's memory.
                value = value.to(layer.router.weight.device, copy=True)
                dist.broadcast(value, dist.get_global_rank(group, owner), group=group)
                yield f"{prefix}{NATIVE}.{index}.{part}", value.cpu()
