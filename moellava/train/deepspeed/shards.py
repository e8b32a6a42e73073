# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's own checkpoint of a dense model, read by parameter, for a run with another number of processes.

Each rank has written flat partitions of all parameters, one behind the other. At ZeRO-1 and 2 a rank's partition is a
stretch of the whole group, and its file says which numbers of it are whose. At ZeRO-3 each parameter is cut into equal
parts, one a rank, and the files of the model say in which order and of which shape they are.

    ZeRO-2   rank 0  [a a a a b b b]   rank 1  [b c c c c . .]
    ZeRO-3   rank 0  [a a b b b c c]   rank 1  [a a b . . c c]
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from moellava.errors import UserError

OPTIMIZER = "optimizer_state_dict"
WEIGHT = "fp32"
_RANK = re.compile(r"zero_pp_rank_(\d+)_")

Part = tuple[int, torch.Tensor]
"""(number of the parameter at which it begins, flat numbers)"""


class EngineStates:
    """The states of all parameters in DeepSpeed's files, which are mapped: what is not asked for is not read.

    Args:
        checkpoint: a run's; read inside `reading`.

    Attributes:
        step: how many steps the optimizer has made; None where it does not count.
        moments: names of the optimizer's states by parameter.
        scaler: fp16's loss scaler.

    Raises:
        UserError: files that hold something else.
    """

    def __init__(self, checkpoint: Path):
        self.folder = checkpoint
        written = [_mapped(path)[OPTIMIZER] for path in _files(checkpoint, "optim_states")]
        layouts = {"param_slice_mappings": _of_stretches, "fp32_flat_groups": _of_parts}
        read = next((read for key, read in layouts.items() if written and key in written[0]), None)
        if read is None:
            raise UserError(
                f"{checkpoint} has no states of DeepSpeed's ZeRO that could be read by parameter: go on with as many "
                "processes as have written it."
            )
        self.scaler = written[0]["loss_scaler"]
        self.step: int | None = None
        self.moments: list[str] = []
        self._parts: dict[str, list[Part]] = {}
        for name, start, weights, states, place in read(checkpoint, written):
            self._parts.setdefault(f"{name}::{WEIGHT}", []).append((start, weights[place]))
            for key, value in states.items():
                if key == "step":
                    self.step = int(value)
                elif torch.is_tensor(value):
                    self._parts.setdefault(f"{name}::{key}", []).append((start, value[place]))
                    self.moments = [*self.moments, key] if key not in self.moments else self.moments

    def read(self, name: str, first: int, count: int) -> torch.Tensor:
        """Numbers `first` to `first + count` of '{parameter}::{state}', flat. Raises UserError: no file holds them."""
        return joined(self._parts.get(name, ()), first, count, f"{self.folder} holds no {name}")


def joined(parts: Sequence[Part] | Iterator[Part], first: int, count: int, lost: str) -> torch.Tensor:
    """Numbers `first` to `first + count` of a tensor in parts. Raises UserError, which begins as `lost`, unless all are
    there."""
    found, have = torch.empty(count), 0
    for start, part in parts:
        begin, end = max(start, first), min(start + len(part), first + count)
        if begin < end:
            found[begin - first : end - first] = part[begin - start : end - start]
            have += end - begin
    if have < count:
        raise UserError(f"{lost}: the checkpoint is of another model or stage.")
    return found


Found = Iterator[tuple[str, int, torch.Tensor, dict[str, Any], slice]]
"""(parameter, number at which its part begins, fp32 weights and states of its group, where it lies in them)"""


def _of_stretches(checkpoint: Path, written: list[dict[str, Any]]) -> Found:
    """ZeRO-1 and 2."""
    begins: dict[str, int] = {}
    for rank in written:
        states = rank["base_optimizer_state"]["state"]
        for number, group in enumerate(rank["param_slice_mappings"]):
            for name, place in group.items():
                start = begins.get(name, 0)
                begins[name] = start + place.numel
                weights = rank["single_partition_of_fp32_groups"][number]
                yield name, start, weights, states.get(number, {}), slice(place.start, place.start + place.numel)


def _of_parts(checkpoint: Path, written: list[dict[str, Any]]) -> Found:
    """ZeRO-3."""
    shapes = _mapped(_files(checkpoint, "model_states")[0])["param_shapes"]
    for number, rank in enumerate(written):
        states = rank[OPTIMIZER]["state"]
        for group, named in enumerate(shapes):
            begin = 0
            for name, shape in named.items():
                size = -(-math.prod(shape) // len(written))
                held = min(size, max(math.prod(shape) - number * size, 0))
                place = slice(begin, begin + held)
                yield name, number * size, rank["fp32_flat_groups"][group], states.get(group, {}), place
                begin += size


def _files(checkpoint: Path, ending: str) -> list[Path]:
    """Files of all ranks, in their order."""
    paths = ((_RANK.search(path.name), path) for path in checkpoint.glob(f"global_step*/*{ending}.pt"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in paths if match)]


def _mapped(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
