# SPDX-License-Identifier: Apache-2.0
"""What a run will need, said before it starts: weights, gradients and optimizer states of one process.

Bytes as in ZeRO (arXiv:1910.02054, section 3): AdamW keeps two fp32 moments per trained parameter, and an fp32 copy of
it when the weights are of lower precision. Stage 1 splits these over the processes, stage 2 the gradients too, stage 3
the weights too. Without DeepSpeed, what trains in 16 bits is in fp32 itself (`masters.py`), so it has no copy: 4 bytes
each for weight and gradient. Activations come on top, and autocast's 16-bit copies; they depend on batch and length.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from moellava.files import read_json

FP32_BYTES = 4
MOMENTS = 2


def zero_stage(deepspeed: str | dict[str, Any] | None) -> int:
    """The ZeRO stage that a DeepSpeed JSON file (or its content) asks for; 0 without DeepSpeed."""
    if not deepspeed:
        return 0
    config = deepspeed if isinstance(deepspeed, dict) else read_json(Path(deepspeed))
    return int(config.get("zero_optimization", {}).get("stage", 0))


def estimate(model: nn.Module, zero: int, processes: int) -> dict[str, float]:
    """Bytes that one process holds, without activations: {"weights", "gradients", "optimizer"}.

    Args:
        model: with `requires_grad` set; under expert parallelism it holds this process's experts only.
        zero: ZeRO stage.
        processes: over which the stage splits.
    """
    weights = gradients = optimizer = 0.0
    for parameter in model.parameters():
        size, count = parameter.element_size(), parameter.numel()
        weights += size * count
        if parameter.requires_grad:
            gradients += size * count
            optimizer += (MOMENTS * FP32_BYTES + (FP32_BYTES if size < FP32_BYTES else 0)) * count
    return {
        "weights": weights / (processes if zero >= 3 else 1),
        "gradients": gradients / (processes if zero >= 2 else 1),
        "optimizer": optimizer / (processes if zero >= 1 else 1),
    }


def describe(bytes_of: dict[str, float]) -> str:
    """The estimate in one line."""
    parts = ", ".join(f"{name} {in_units(count)}" for name, count in bytes_of.items())
    return f"Memory of each process without activations: {in_units(sum(bytes_of.values()))} ({parts})"


def in_units(count: float) -> str:
    """Bytes in MB or GB (powers of ten)."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
