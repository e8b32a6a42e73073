# SPDX-License-Identifier: Apache-2.0
"""Optimizer states of a sparse model that do not depend on `ep_size`.

DeepSpeed's own checkpoint holds flat partitions, one a rank, cut for the processes and expert groups of the run that
wrote it. Beside it lies the same by parameter, experts under their global ids, so that a run can go on with another
`ep_size`:

    portable/state-rank-0.safetensors   {native name}::{fp32 | exp_avg | exp_avg_sq}, whole tensors
    portable/state-rank-1.safetensors   the experts that rank 0 does not hold
    portable/meta.json                  {"ep_size", "step"}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from moellava.errors import UserError
from moellava.files import read_json, write_json
from moellava.moe import moe_layers, native_names

FOLDER = "portable"
META = "meta.json"
WEIGHT = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's states by parameter, as torch and DeepSpeed call them."""


def expert_parallel_size(model: nn.Module) -> int:
    """Processes that share one set of experts; 1 for a dense model or the native engine."""
    return max((getattr(layer, "ep_size", 1) for _, layer in moe_layers(model)), default=1)


def stored_ep_size(checkpoint: Path) -> int | None:
    """The `ep_size` of the run that wrote a checkpoint; None if it holds no portable states."""
    meta = checkpoint / FOLDER / META
    return read_json(meta)["ep_size"] if meta.is_file() else None


def save_portable(engine: Any, model: nn.Module, checkpoint: Path) -> None:
    """Writes the states of a DeepSpeed engine at ZeRO-1 or 2. Collective.

    Args:
        engine: whose optimizer has made at least one step.
        model: the engine's module.
        checkpoint: folder of the checkpoint that is being written.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    link_states(engine.optimizer)
    ep_size, rank = expert_parallel_size(model), dist.get_rank()
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter, is_expert in trained(model):
        whole = {WEIGHT: safe_get_full_fp32_param(parameter)}
        whole |= {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        if rank == 0 or (is_expert and rank < ep_size):
            tensors |= {f"{name}::{key}": value.cpu().contiguous() for key, value in whole.items()}
    folder = checkpoint / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    if tensors:
        save_file(tensors, folder / f"state-rank-{rank}.safetensors")
    if rank == 0:
        write_json(folder / META, {"ep_size": ep_size, "step": adam_step(engine)})


def load_portable(engine: Any, model: nn.Module, checkpoint: Path) -> None:
    """Gives an engine that has not stepped yet the states that `save_portable` wrote, whatever its `ep_size`.

    Raises:
        UserError: a parameter's states are not there.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    meta = read_json(checkpoint / FOLDER / META)
    start_states(engine, meta["step"])
    stored = StoredStates(checkpoint / FOLDER)
    with torch.no_grad():
        for name, parameter, _ in trained(model):
            weight = stored.read(f"{name}::{WEIGHT}").to(parameter.device)
            parameter.copy_(weight)
            safe_set_full_fp32_param(parameter, weight)
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, stored.read(f"{name}::{key}").to(parameter.device), key)


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """(native name, parameter, whether it is an expert's) of what trains, in one order on every rank."""
    names = native_names(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield names.get(name, name), parameter, not getattr(parameter, "allreduce", True)


def adam_step(engine: Any) -> int:
    """How many steps the optimizer has made, by its own count (it corrects Adam's bias with it)."""
    return int(next(iter(engine.optimizer.optimizer.state.values()))["step"])


def start_states(engine: Any, step: int) -> None:
    """Makes the states that DeepSpeed would make at its first step, and links them to the parameters."""
    zero = engine.optimizer
    for partition in zero.single_partition_of_fp32_groups:
        moments = {key: torch.zeros_like(partition) for key in MOMENTS}
        zero.optimizer.state[partition] = {"step": torch.tensor(float(step)), **moments}
    link_states(zero)


def link_states(zero: Any) -> None:
    """Connects parameters with their slices of the states.

    DeepSpeed does so at its first step, after the first of its parameter groups alone has stepped: the parameters of
    all other groups, experts among them, then seem to have no states.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    for parameters, partition in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(parameters, partition, zero.optimizer.state)


class StoredStates:
    """Tensors of all ranks' files by name, read when asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        for file in sorted(folder.glob("state-rank-*.safetensors")):
            with safe_open(file, framework="pt") as states:
                self._file_of |= dict.fromkeys(states.keys(), file)

    def read(self, name: str) -> torch.Tensor:
        """One tensor. Raises UserError if no file holds it."""
        if name not in self._file_of:
            raise UserError(f"{self.folder} holds no {name}: the checkpoint is of another model or stage.")
        with safe_open(self._file_of[name], framework="pt") as states:
            return states.get_tensor(name)
