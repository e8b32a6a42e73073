# SPDX-License-Identifier: Apache-2.0
"""fp32 masters of 16-bit weights, for the native engine; DeepSpeed keeps its own.

A step of 2e-5 is smaller than half the distance between two bf16 numbers near 1, so a 16-bit weight of a norm would
never move. What trains is held in fp32, computes in 16 bits under autocast, and is saved in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Masters:
    """Which weights of a model are masters.

    Args:
        names: in its state dict.
        dtype: that they had, and are saved in.
    """

    names: frozenset[str]
    dtype: torch.dtype

    def lowered(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A state dict whose masters are 16-bit weights again; tensors that are one stay one."""
        once: dict[int, torch.Tensor] = {}
        return {
            name: once.setdefault(value.data_ptr(), value.to(self.dtype)) if name in self.names else value
            for name, value in state.items()
        }


def masters_of(model: nn.Module, dtype: torch.dtype) -> Masters | None:
    """The masters of a model that is yet to be sharded: what trains in `dtype`. None where nothing does, or `dtype` is
    fp32."""
    places = {parameter.data_ptr() for parameter in _to_raise(model, dtype)}
    names = frozenset(name for name, value in model.state_dict().items() if value.data_ptr() in places)
    return Masters(names, dtype) if names else None


def raise_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes what trains in `dtype` fp32: of a sharded model this process's share alone."""
    for parameter in _to_raise(model, dtype):
        if isinstance(parameter, DTensor):  # whose data is a tensor inside it, which torch exchanges only so
            raised = nn.Parameter(parameter.detach().float())
            torch.utils.swap_tensors(parameter, raised)
        else:
            parameter.data = parameter.data.float()


def _to_raise(model: nn.Module, dtype: torch.dtype) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad and p.dtype == dtype != torch.float32]
