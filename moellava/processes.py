# SPDX-License-Identifier: Apache-2.0
"""The processes of a run, as launchers set them and as torch.distributed joins them."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
import torch.distributed as dist

Key = TypeVar("Key")
Value = TypeVar("Value")


def rank() -> int:
    """This process's rank, also before process groups exist (`RANK` as launchers set it)."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes, also before process groups exist."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def _are_several() -> bool:
    """Whether this process is joined with others."""
    return dist.is_initialized() and dist.get_world_size() > 1


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over all processes, in place; the tensor itself where there is one process."""
    if _are_several():
        dist.all_reduce(values)
    return values


def joined_over_processes(known: dict[Key, Value]) -> dict[Key, Value]:
    """What any process knows, on all of them; they come here together."""
    if not _are_several():
        return known
    parts: list[dict[Key, Value]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, known)
    return {key: value for part in parts for key, value in part.items()}


def of_rank_zero(value: Value) -> Value:
    """What the first process has, on all of them; they come here together."""
    if not _are_several():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def leave_group() -> None:
    """Ends the process group of a run that all processes have finished, and come here together.

    One that is left to the interpreter's end closes its connections while other processes may still read from them.
    """
    if _are_several():
        dist.barrier()
        dist.destroy_process_group()
