# SPDX-License-Identifier: Apache-2.0
"""What a run will need, said before it starts: weights, gradients and optimizer states of one process.

Bytes as in ZeRO (arXiv:1910.02054, section 3): AdamW keeps two fp32 moments per trained parameter, and DeepSpeed an
fp32 copy of it, also of one that is in fp32 itself. Stage 1 splits these over the processes, stage 2 the gradients too,
stage 3 the weights too. Experts that are spread over `ep_size` processes are split over those that hold the same ones.
FSDP2 splits all of it, experts too, whatever `ep_size` is, and gathers a layer while it computes. Without DeepSpeed,
what trains in 16 bits is in fp32 itself (`masters.py`): 4 bytes each for weight and gradient, and (not under FSDP2)
autocast's 16-bit copies while a step computes. Activations come on top; `moellava plan` tells them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from moellava.files import read_json
from moellava.moe import routed_expert_parameters

FP32_BYTES = 4
MOMENTS = 2

DEFAULT_BUCKET = 500_000_000
"""DeepSpeed's own `reduce_bucket_size`."""


@dataclass(frozen=True)
class Layout:
    """How a run lies over its processes.

    Args:
        processes: of the run.
        deepspeed: whether DeepSpeed trains; else the native engine, by torch's DistributedDataParallel.
        zero: ZeRO stage.
        ep_size: processes that share one set of experts.
        offload: whether optimizer states are in the host's memory.
        fsdp: processes that hold one copy of the model together (FSDP2, without DeepSpeed).
        bucket: numbers of the buffer in which DeepSpeed sums gradients; 0: as many as the hidden size has, squared
            (transformers' `"reduce_bucket_size": "auto"`).
        buffers: of these, beside the gradients themselves.
    """

    processes: int
    deepspeed: bool = True
    zero: int = 0
    ep_size: int = 1
    offload: bool = False
    fsdp: int = 1
    bucket: int = 0
    buffers: int = 1


def zero_stage(deepspeed: str | dict[str, Any] | None) -> int:
    """The ZeRO stage that a DeepSpeed JSON file (or its content) asks for; 0 without DeepSpeed."""
    if not deepspeed:
        return 0
    config = deepspeed if isinstance(deepspeed, dict) else read_json(Path(deepspeed))
    return int(config.get("zero_optimization", {}).get("stage", 0))


def layout_of(
    deepspeed: str | dict[str, Any] | None, processes: int, ep_size: int = 1, fsdp: int = 1, is_gpu: bool = True
) -> Layout:
    """How a run lies over its processes by its DeepSpeed JSON file (or its content); None: the native engine.

    Args:
        is_gpu: whether a buffer takes its memory when it is made. On a CPU its pages are there once written, and a
            gradient that is moved into them has left its own; the one of ZeRO-3 is kept.
    """
    if not deepspeed:
        return Layout(processes, deepspeed=False, ep_size=ep_size, fsdp=fsdp)
    config = deepspeed if isinstance(deepspeed, dict) else read_json(Path(deepspeed))
    zero = config.get("zero_optimization", {})
    stage, bucket = zero_stage(config), zero.get("reduce_bucket_size", DEFAULT_BUCKET)
    return Layout(
        processes,
        zero=stage,
        ep_size=ep_size,
        offload=zero.get("offload_optimizer", {}).get("device", "none") != "none",
        bucket=0 if bucket == "auto" else int(bucket),
        buffers=_buffers(zero, stage, is_gpu),
    )


def _buffers(zero: dict[str, Any], stage: int, is_gpu: bool) -> int:
    """How many buffers of gradients take memory of their own, by `zero_optimization`; `auto` overlaps on a GPU."""
    if stage == 0 or not zero.get("contiguous_gradients", True):
        return 0
    if stage == 3:
        return 1
    return (2 if zero.get("overlap_comm") else 1) if is_gpu else 0


def estimate(model: nn.Module, layout: Layout) -> dict[str, float]:
    """Bytes that one process holds, without activations: {"weights", "gradients", "optimizer"}.

    Args:
        model: with `requires_grad` set, on any device, meta included; it holds this process's experts only.
        layout: of the run.
    """
    held = dict.fromkeys(("weights", "gradients", "optimizer"), 0.0)
    experts = {id(parameter) for parameter in routed_expert_parameters(model)}
    for parameter in model.parameters():
        same = layout.processes // (layout.ep_size if id(parameter) in experts else 1)
        size, count = parameter.element_size(), parameter.numel()
        if parameter.requires_grad:
            for part, number in _trained(size, layout, same).items():
                held[part] += number * count
        else:
            held["weights"] += size * count / (layout.processes if layout.zero >= 3 else layout.fsdp)
    return held


def _trained(size: int, layout: Layout, processes: int) -> dict[str, float]:
    """Bytes for one trained number of `size` bytes, of which `processes` hold the same.

    The native engine's gradients are twice there in more than one process: DistributedDataParallel sums copies.
    """
    if layout.fsdp > 1:
        parts = {"weights": FP32_BYTES, "gradients": FP32_BYTES, "optimizer": MOMENTS * FP32_BYTES}
        return {part: count / layout.fsdp for part, count in parts.items()}
    if not layout.deepspeed:
        copies = 2 if layout.processes > 1 else 1
        cast = size if size < FP32_BYTES else 0
        return {
            "weights": FP32_BYTES + cast,
            "gradients": FP32_BYTES * copies,
            "optimizer": MOMENTS * FP32_BYTES,
        }
    master = FP32_BYTES if size < FP32_BYTES or layout.zero else 0
    return {
        "weights": size / (processes if layout.zero >= 3 else 1),
        "gradients": size / (processes if layout.zero >= 2 else 1),
        "optimizer": 0.0 if layout.offload else (MOMENTS * FP32_BYTES + master) / (processes if layout.zero else 1),
    }


def describe(bytes_of: dict[str, float]) -> str:
    """The estimate in one line."""
    parts = ", ".join(f"{name} {in_units(count)}" for name, count in bytes_of.items())
    return f"Memory of each process without activations: {in_units(sum(bytes_of.values()))} ({parts})"


def in_units(count: float) -> str:
    """Bytes in MB or GB (powers of ten)."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
