# SPDX-License-Identifier: Apache-2.0
"""State dicts of sparse models in one naming: experts under their global index, whatever engine and ep_size ran.

A name of the native engine is `…mlp.experts.{e}.<part>`; the DeepSpeed engine's own is
`…mlp.deepspeed_moe.experts.deepspeed_experts.{local e}.<part>`. All other names are the same in both.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor, nn

from moellava.moe.layer import RoutedMLP

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


def gather_moe_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's whole state dict with native names on rank 0; {} elsewhere.

    Collective when experts are spread over ranks: every rank must call it. With DeepSpeed, `model` is the engine's
    `module`, and its weights are those of the model's dtype (`gather_optimizer_state` has the fp32 ones).
    """
    names = native_names(model)
    state = {names.get(name, name): value for name, value in model.state_dict().items()}
    for prefix, layer in named_sparse_layers(model):
        if getattr(layer, "ep_size", 1) > 1:
            state |= _spread_experts(prefix, layer)
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    return state if is_first else {}


def _spread_experts(prefix: str, layer: RoutedMLP) -> dict[str, Tensor]:
    """All experts of one layer, by broadcasts within the expert group; kept by rank 0 alone."""
    group = layer.deepspeed_moe.ep_group
    own = list(layer.local_experts().values())
    state = {}
    for index in range(layer.n_experts):
        owner, local = divmod(index, len(own))
        for part, value in own[local].state_dict().items():
            # To the layer's device: quantised experts show their weights in the host's memory.
            value = value.to(layer.router.weight.device, copy=True)
            dist.broadcast(value, dist.get_global_rank(group, owner), group=group)
            if dist.get_rank() == 0:
                state[f"{prefix}{NATIVE}.{index}.{part}"] = value.cpu()
    return state
