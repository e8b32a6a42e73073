# SPDX-License-Identifier: Apache-2.0
"""Where a model computes, and in what precision."""

from __future__ import annotations

import torch

from moellava.errors import UserError


def default_dtype(device: torch.device) -> torch.dtype:
    """The dtype that a device computes in well: bf16 or fp16 on GPUs, fp32 on CPUs."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32


def default_device() -> torch.device:
    """A GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")


def device_named(name: torch.device | str) -> torch.device:
    """A device by its name. Raises UserError for one that torch does not know, or that this machine lacks."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the second
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device
