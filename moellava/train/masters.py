# SPDX-License-Identifier: Apache-2.0
"""fp32 masters of 16-bit weights, for the native engine; DeepSpeed keeps its own.

A step of 2e-5 is smaller than half the distance between two bf16 numbers near 1, so a 16-bit weight of a norm would
never move. What trains is held in fp32, begins with what the folder holds, computes in 16 bits under autocast, and is
saved in 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moellava.model.stored import meant


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
    """The masters of a model that is yet to be sharded: what trains and is meant to be in `dtype`. None where nothing
    is, or `dtype` is fp32."""
    places = {p.data_ptr() for p in model.parameters() if p.requires_grad and meant(p) == dtype != torch.float32}
    names = frozenset(name for name, value in model.state_dict().items() if value.data_ptr() in places)
    return Masters(names, dtype) if names else None


def dtypes_of(model: nn.Module, masters: Masters | None) -> dict[str, torch.dtype]:
    """Name of a parameter -> what it is held in while the model trains: fp32 for masters."""
    names = frozenset() if masters is None else masters.names
    return {name: torch.float32 if name in names else meant(one) for name, one in model.named_parameters()}


def cast(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Casts parameters, by name: of a sharded model this process's share alone."""
    for name, parameter in list(model.named_parameters()):
        if parameter.dtype == dtypes[name]:
            continue
        if isinstance(parameter, DTensor):  # whose data is a tensor inside it, which torch exchanges only so
            share = nn.Parameter(parameter.detach().to(dtypes[name]), requires_grad=parameter.requires_grad)
            torch.utils.swap_tensors(parameter, share)
        else:
            parameter.data = parameter.data.to(dtypes[name])
