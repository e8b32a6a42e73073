# SPDX-License-Identifier: Apache-2.0
"""Optimizer states by parameter, which do not depend on `ep_size`, nor on the number of processes.

DeepSpeed's own checkpoint holds flat partitions, one a rank, cut for the processes and expert groups of the run that
wrote it. Those of a dense model are read by parameter as they are (`shards.py`). Beside those of a sparse one lies the
same by parameter, experts under their global ids, so that a run can go on with another `ep_size`. Each rank writes what
it holds, and nothing is gathered: a stretch of each parameter that lies in its partitions.

    portable/state-rank-0.safetensors   {native name}::{fp32 | exp_avg | exp_avg_sq}::{first number}, a flat stretch
    portable/state-rank-1.safetensors   …
    portable/meta.json                  {"ep_size", "step"}

Older checkpoints hold whole tensors, without the number; they are read as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn

from moellava.convert.tensor_files import TensorFiles
from moellava.errors import UserError
from moellava.files import read_json, write_json
from moellava.log import get_logger
from moellava.model.weights import read_file, weight_files
from moellava.moe import moe_layers, native_names
from moellava.train.deepspeed.shards import WEIGHT, EngineStates, Part, joined
from moellava.train.hf_flags import word
from moellava.train.memory import zero_stage
from moellava.train.split import in_words, processes_of

logger = get_logger(__name__)

FOLDER = "portable"
META = "meta.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's states by parameter, as torch and DeepSpeed call them."""


def expert_parallel_size(model: nn.Module) -> int:
    """Processes that share one set of experts; 1 for a dense model or the native engine."""
    return max((getattr(layer, "ep_size", 1) for _, layer in moe_layers(model)), default=1)


def stored_ep_size(checkpoint: Path) -> int | None:
    """The `ep_size` of the run that wrote a checkpoint; None if it holds no portable states."""
    meta = checkpoint / FOLDER / META
    return read_json(meta)["ep_size"] if meta.is_file() else None


def spread_of(checkpoint: Path) -> tuple[int, int]:
    """(processes, `ep_size`) of the run that wrote a checkpoint."""
    return processes_of(checkpoint), stored_ep_size(checkpoint) or 1


ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""Optimizers (`--optim`) whose states are numbers of each weight, so that they can be dealt out anew."""

UNREAD = {
    "an optimizer of its own": lambda config: "optimizer" in config,
    "a schedule of its own": lambda config: "scheduler" in config,
    "states on NVMe": lambda config: '"nvme"' in json.dumps(config.get("zero_optimization", {})),
    "elastic_checkpoint": lambda config: config.get("zero_optimization", {}).get("elastic_checkpoint"),
}
"""What DeepSpeed's settings may ask for, and is not read by parameter."""


def refuse_unreadable(args: Any, checkpoint: Path) -> None:
    """Raises UserError for a checkpoint of another number of processes whose states cannot be read by parameter.

    Args:
        args: the run's TrainingArguments.
        checkpoint: from which it would go on.
    """
    written, optimizer = processes_of(checkpoint), word(args.optim)
    if written == args.world_size or not zero_stage(args.deepspeed):
        return
    config = args.deepspeed if isinstance(args.deepspeed, dict) else read_json(Path(args.deepspeed))
    named = [name for name, asks in UNREAD.items() if asks(config)]
    why = f"--deepspeed {args.deepspeed} with {' and '.join(named)}" if named else ""
    if optimizer not in ELEMENTWISE:
        why = f"--optim {optimizer} (of {', '.join(ELEMENTWISE)} they can)"
    if why:
        raise UserError(
            f"{checkpoint} was written by {in_words(written)}, and now there are {args.world_size}: the states of "
            f"{why} cannot be dealt out anew. Go on with {in_words(written)}."
        )


def save_portable(engine: Any, model: nn.Module, checkpoint: Path) -> None:
    """Writes the states of a DeepSpeed engine at ZeRO-1 or 2: each rank its own, tensor by tensor.

    Args:
        engine: whose optimizer has made at least one step.
        model: the engine's module.
        checkpoint: folder of the checkpoint that is being written.
    """
    link_states(engine.optimizer)
    folder = checkpoint / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    own = dict(stretches(model))
    if own:
        planned = {name: torch.empty_like(stretch, device="meta") for name, stretch in own.items()}
        files = TensorFiles(folder, planned, stem=f"state-rank-{dist.get_rank()}")
        for name, stretch in own.items():
            files.write(name, stretch.cpu())
    if dist.get_rank() == 0:
        write_json(folder / META, {"ep_size": expert_parallel_size(model), "step": adam_step(engine)})


def load_portable(engine: Any, model: nn.Module, checkpoint: Path, rates: Sequence[float]) -> None:
    """Gives an engine that has not stepped yet the states of a checkpoint, whatever `ep_size` and number of ranks wrote
    it: each reads the weights of its parameters and the moments of its own stretches.

    Args:
        engine: whose states they become.
        model: the engine's module.
        checkpoint: a run's.
        rates: the learning rate of each group, which a schedule sets when it steps, not when it is read.

    Raises:
        UserError: a parameter's states are not there.
    """
    processes, ep_size = spread_of(checkpoint)
    told = "%s was written with --ep_size %d by %s: reading it by parameter."
    logger.info(told, checkpoint, ep_size, in_words(processes))
    for group, rate in zip(engine.optimizer.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    stored = StoredStates(checkpoint / FOLDER) if (checkpoint / FOLDER).is_dir() else EngineStates(checkpoint)
    start_states(engine, stored.step, stored.moments)
    with torch.no_grad():
        if engine.zero_optimization_partition_weights():
            fill_parts(engine, model, stored)
        else:
            fill_stretches(model, stored)
        fill_buffers(model, checkpoint)
    if stored.scaler is not None:
        engine.optimizer.loss_scaler = stored.scaler


def fill_stretches(model: nn.Module, stored: States) -> None:
    """Weights and states at ZeRO-1 and 2."""
    for name, parameter, _ in trained(model):
        parameter.copy_(stored.read(f"{name}::{WEIGHT}", 0, parameter.numel()).view_as(parameter))
    for name, stretch in stretches(model, stored.moments):
        called, _, first = name.rpartition("::")
        stretch.copy_(stored.read(called, int(first), stretch.numel()))


def fill_parts(engine: Any, model: nn.Module, stored: States) -> None:
    """Weights and states at ZeRO-3, where each rank holds a part of every parameter, the last ones padded."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    engine.optimizer.checkpoint_event_prologue()  # parameters that are small lie whole in every rank: part them
    for name, parameter, _ in trained(model):
        part = torch.zeros(parameter.ds_tensor.numel())
        first = dist.get_rank() * len(part)
        held = min(len(part), max(parameter.ds_numel - first, 0))
        for key in (*stored.moments, WEIGHT):
            part[:held] = stored.read(f"{name}::{key}", first, held)
            if key == WEIGHT:
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, key)
        parameter.ds_tensor.copy_(part)
    engine.optimizer.checkpoint_event_epilogue()


def fill_buffers(model: nn.Module, checkpoint: Path) -> None:
    """What a model has learnt without an optimizer: the routers' selection biases."""
    buffers = dict(model.named_buffers())
    for file in weight_files(checkpoint):
        for name, value in read_file(file):
            if name in buffers:
                buffers[name].copy_(value)


def stretches(model: nn.Module, moments: Sequence[str] = MOMENTS) -> Iterator[tuple[str, torch.Tensor]]:
    """("{native name}::{state}::{first number}", flat stretch) of the states that lie in this rank's partitions."""
    for name, parameter, _ in trained(model):
        held = parameter._hp_mapping  # None: all of it lies in other ranks' partitions
        if held is not None:
            for key in (WEIGHT, *moments):
                fragment = held.get_hp_fragment(None if key == WEIGHT else key)
                yield f"{name}::{key}::{held.lp_fragment_address.start}", fragment


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """(native name, parameter, whether it is an expert's) of what trains, in one order on every rank."""
    names = native_names(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield names.get(name, name), parameter, not getattr(parameter, "allreduce", True)


def adam_step(engine: Any) -> int:
    """How many steps the optimizer has made, by its own count (it corrects Adam's bias with it)."""
    return int(next(iter(engine.optimizer.optimizer.state.values()))["step"])


def start_states(engine: Any, step: int | None, moments: Sequence[str]) -> None:
    """Makes the states that DeepSpeed would make at its first step, and links them to the parameters."""
    zero, is_parted = engine.optimizer, engine.zero_optimization_partition_weights()
    on_device = any(group.get("fused") or group.get("capturable") for group in zero.optimizer.param_groups)
    for partition in zero.fp32_partitioned_groups_flat if is_parted else zero.single_partition_of_fp32_groups:
        state = {key: torch.zeros_like(partition) for key in moments}
        if step is not None:
            state["step"] = torch.tensor(float(step), device=partition.device if on_device else "cpu")
        zero.optimizer.state[partition] = state
    if not is_parted:
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
    """Tensors of all ranks' files by name, of which what is asked for is read. For the attributes see
    `EngineStates`."""

    moments: Sequence[str] = MOMENTS
    scaler = None

    def __init__(self, folder: Path):
        self.folder = folder
        self._parts: dict[str, list[tuple[int, Path, str]]] = {}
        for file in sorted(folder.glob("state-rank-*.safetensors")):
            with safe_open(file, framework="pt") as states:
                for stored in states.keys():  # noqa: SIM118 (no mapping)
                    name, _, first = stored.rpartition("::")
                    is_stretch = first.isdecimal()
                    part = (int(first) if is_stretch else 0, file, stored)
                    self._parts.setdefault(name if is_stretch else stored, []).append(part)

    def read(self, name: str, first: int, count: int) -> torch.Tensor:
        """Numbers `first` to `first + count` of a tensor, flat, in fp32. Raises UserError if no file holds them."""
        return joined(self._flat(name), first, count, f"{self.folder} holds no {name}")

    def _flat(self, name: str) -> Iterator[Part]:
        for start, file, stored in self._parts.get(name, ()):
            with safe_open(file, framework="pt") as states:
                yield start, states.get_tensor(stored).flatten()  # mapped: what is not copied is not read

    @property
    def step(self) -> int:
        """See `EngineStates`."""
        return read_json(self.folder / META)["step"]


States = StoredStates | EngineStates
