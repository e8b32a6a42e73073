# SPDX-License-Identifier: Apache-2.0
"""Weights, gradients and optimizer states that are sharded over processes without DeepSpeed: torch's FSDP2, and beside
it the expert parallelism of transformers for language models that have experts of their own.

    --fsdp_size 4 --ep_size 2, a layer with experts 0 to 3

    rank             0            1            2            3
    dense weights    quarter 0    quarter 1    quarter 2    quarter 3    gathered while a layer computes
    experts          0            2            1            3            ranks 0 and 2 gather 0 and 1 of each other,
                                                                         0 and 1 send each other the rows of theirs

A model is put together as for every engine, whole (where its folder is mapped, nothing of it is read yet), and sharded
in place before it trains. What is sharded is a `DTensor`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import DistributedConfig
from transformers.distributed.utils import TransformersDeviceMesh, gather_full_state_dict

from moellava.errors import UserError
from moellava.model.build import quietly
from moellava.processes import world_size

STATES = "fsdp"
"""The folder of a checkpoint that holds optimizer states, in shards."""

DISPATCH = "ep_dispatch_experts"
"""What transformers calls, in a model's plan, the modules whose experts may lie on several processes."""

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
"""A layer's, in the name of a module."""


def is_fsdp(model: nn.Module) -> bool:
    """Whether parameters of a model are sharded by `shard`. They may all be gathered at the moment: behind a forward
    without a backward, where layers have no groups of their own."""
    return isinstance(model, FSDPModule)


def own(tensor: torch.Tensor) -> torch.Tensor:
    """This process's share of a tensor; all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, on every process. Collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mesh_of(tensor: torch.Tensor) -> Any:
    """The processes that a tensor is sharded over; None where it is not."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def check_shards(model: Any, called: str, fsdp_size: int, ep_size: int) -> None:
    """Raises UserError for a model whose experts cannot be spread so. All others can be sharded.

    Args:
        model: as one process would train it.
        called: what the user called it.
        fsdp_size, ep_size: the flags.
    """
    if ep_size == 1:
        return
    flags = f"--fsdp_size {fsdp_size} --ep_size {ep_size}"
    counts = {module.num_experts for module in spread_experts(model)}
    text = model.config.get_text_config().model_type
    if not counts:
        raise UserError(
            f"{flags}: transformers spreads no experts of the language model of {called} ({text}) over processes. "
            "Leave --ep_size out: --fsdp_size alone splits all weights."
        )
    for count in sorted(counts):
        if count % ep_size:
            raise UserError(f"{flags}: --ep_size does not divide the {count} experts of {called}'s language model.")


def spread_experts(model: Any) -> Iterator[nn.Module]:
    """The modules of a model whose experts may lie on several processes."""
    plan = model.ep_plan  # in which `*` stands for a layer's number
    return (module for name, module in model.named_modules() if plan.get(NUMBER.sub("*", name)) == DISPATCH)


def shard(model: Any, fsdp_size: int, ep_size: int, device: torch.device, in_16_bits: bool = False) -> None:
    """Shards a model in place over the processes of this run. Collective.

    Args:
        model: of which all processes hold the same, `requires_grad` set.
        fsdp_size: processes that hold one copy of it together; with more processes, there are several copies.
        ep_size: of these, processes that hold one set of experts together, each whole ones of it.
        device: what computes.
        in_16_bits: gather weights as bf16, also those that train and are held in fp32. Autocast's own copies of them
            would stay until the backward, of all layers.
    """
    copies = world_size() // fsdp_size
    sizes = {"fsdp_size": fsdp_size, "dp_replicate_size": copies, "ep_size": ep_size}
    config = DistributedConfig(**sizes, fsdp_mixed_precision=in_16_bits)
    dense = (1, copies, fsdp_size, 1)
    experts = (1, copies, config.efsdp_size, ep_size)
    mesh = TransformersDeviceMesh(
        init_device_mesh(device.type, dense, mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp")),
        init_device_mesh(device.type, experts, mesh_dim_names=("pp", "dp_replicate", "efsdp", "ep")),
    )
    with quietly():  # of a plan for all models, which has names that this one lacks
        type(model).maybe_distribute_model(model, config, mesh)
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, parts of a sharded model that belong to no layer are whole: tower and projector may be called beside the
    model's forward, as by benchmarks that encode each picture once. Collective."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def whole_state(model: Any) -> dict[str, torch.Tensor]:
    """The state dict of a sharded model, gathered on the first process; {} elsewhere. Collective.

    Parameters that are one under several names are one tensor there, too: torch gathers each name by itself."""
    state = gather_full_state_dict(model)
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if name in state and known in state:
            state[name] = state[known]
    return state


def load_part(model: nn.Module, part: Mapping[str, torch.Tensor]) -> Any:
    """Copies whole tensors into a sharded model, each process its share; as `load_state_dict(strict=False)`."""
    return set_model_state_dict(model, dict(part), options=StateDictOptions(full_state_dict=True, strict=False))


def save_states(model: nn.Module, optimizer: Any, checkpoint: Path) -> None:
    """Writes optimizer states as safetensors, by parameter: each process its share. Collective.

    transformers would write torch's own format, whose index is a pickle: reading it runs what stands in it.
    """
    writer = HuggingFaceStorageWriter(str(checkpoint / STATES), save_distributed=True)
    dcp.save(_in_stretches(_states(model, optimizer)), storage_writer=writer)


def load_states(model: nn.Module, optimizer: Any, checkpoint: Path) -> None:
    """Reads optimizer states, whatever --fsdp_size and --ep_size wrote them. Collective.

    A parameter that nothing reads (the last norm of a tower of which an earlier layer is read) has had no gradient, and
    has no state there. It has none here, then.
    """
    reader = HuggingFaceStorageReader(str(checkpoint / STATES))
    there = {_parameter_of(name) for name in reader.read_metadata().state_dict_metadata}
    state = _states(model, optimizer)
    read = {name: value for name, value in _in_stretches(state).items() if _parameter_of(name) in there}
    dcp.load(read, storage_reader=reader)
    for name, value in read.items():
        state[name] = value.redistribute(placements=state[name].placements) if isinstance(value, DTensor) else value
    set_optimizer_state_dict(model, optimizer, state, options=FLAT)
    for name, parameter in model.named_parameters():
        if name not in there:
            optimizer.state.pop(parameter, None)


def _parameter_of(name: str) -> str:
    """`lm_head.weight` of `state.lm_head.weight.exp_avg`."""
    return name.removeprefix("state.").rpartition(".")[0]


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
"""Optimizer states by the parameter's name and their own: `state.lm_head.weight.exp_avg`."""


def _states(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return get_optimizer_state_dict(model, optimizer, options=FLAT)


def _in_stretches(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, each process with one stretch of each, as files hold them: experts that lie on
    several processes and are split over others besides are in several (`_StridedShard`)."""
    found = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return {name: _in_stretch(value) if isinstance(value, DTensor) else value for name, value in found.items()}


def _in_stretch(tensor: DTensor) -> DTensor:
    dims = [getattr(placement, "dim", None) for placement in tensor.placements]
    return tensor.redistribute(placements=[Replicate() if dim is None else Shard(dim) for dim in dims])


def require_same_engine(checkpoint: Path, fsdp: bool) -> None:
    """Raises UserError for a checkpoint whose optimizer states this run would not find."""
    there = (checkpoint / STATES).is_dir()
    if there != fsdp:
        wrote, way = ("with", "with it") if there else ("without", "without it")
        raise UserError(f"{checkpoint} was written {wrote} --fsdp_size: go on {way}, or start anew elsewhere.")
