# SPDX-License-Identifier: Apache-2.0
"""LLaVA's LoRA folders: low-rank matrices for a language model, and beside them what trained in full.

adapter_config.json, adapter_model.bin (or .safetensors)   peft's, over the names of LLaVA's class
non_lora_trainables.bin                                     the projector, under the same names
config.json                                                 of the LLaVA model that base and both make together
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moellava.errors import UserError
from moellava.files import read_object
from moellava.model.manifest import Manifest
from moellava.model.weights import read_file

SETTINGS = "adapter_config.json"
MATRICES = ("adapter_model.safetensors", "adapter_model.bin")
FULL = "non_lora_trainables.bin"

WRAPPED = ("base_model.model.", "base_model.")
"""What peft puts before the names of the model that it wraps; that of both where it saves its own, one where LLaVA
does."""

VARIANTS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "modules_to_save")
"""Settings under which W + alpha / r · B A is not what the adapted linear computes, or not all that was trained."""

MATRIX = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


def is_lora(folder: Path) -> bool:
    """Whether a published folder holds an adapter in place of a model."""
    return (folder / SETTINGS).is_file() and any((folder / name).is_file() for name in MATRICES)


def lora_tensors(manifest: Manifest, base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the model that a base and a LoRA folder make together, under LLaVA's names.

    Args:
        manifest: of the folder.
        base: the language model's tensors, under its own names.

    Raises:
        UserError: files are missing, the adapter is of another sort, or it has learnt on another base.
    """
    folder = manifest.folder
    if not (folder / FULL).is_file():
        raise UserError(
            f"{manifest.called} holds an adapter, but no {FULL}, where LLaVA keeps the projector: fetch that file, too."
        )
    scaling = scaling_of(folder)
    tensors = dict(base) | {_unwrapped(name): value for name, value in read_file(folder / FULL)}
    matrices: dict[str, dict[str, torch.Tensor]] = {}
    weights = next(folder / name for name in MATRICES if (folder / name).is_file())
    for name, value in read_file(weights):
        match = MATRIX.fullmatch(_unwrapped(name))
        if match is None:
            raise UserError(f"{weights} holds {name}, which is no matrix of LoRA.")
        matrices.setdefault(f"{match[1]}.weight", {})[match[2]] = value
    for name, pair in matrices.items():
        weight = tensors.get(name)
        if weight is None or set(pair) != {"A", "B"} or weight.shape != (len(pair["B"]), pair["A"].shape[-1]):
            found = "no such tensor" if weight is None else f"{list(weight.shape)}"
            raise UserError(
                f"{weights} adapts {name} by matrices {[list(part.shape) for part in pair.values()]}, but the language "
                f"model that --model-base gives has {found} there: it is another one than the adapter has learnt on."
            )
        tensors[name] = (weight.float() + scaling * (pair["B"].float() @ pair["A"].float())).to(weight.dtype)
    return tensors


def scaling_of(folder: Path) -> float:
    """Factor of B A. Raises UserError for what is no plain LoRA."""
    raw: dict[str, Any] = read_object(folder / SETTINGS)
    variants = [name for name in VARIANTS if raw.get(name)]
    if raw.get("peft_type") != "LORA" or variants:
        what = ", ".join(variants) or f"peft_type {raw.get('peft_type')!r}"
        raise UserError(f"{folder / SETTINGS} describes {what}; plain LoRA is what can be merged here.")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise UserError(f"{folder / SETTINGS} is damaged: r is {rank!r} and lora_alpha {alpha!r}.")
    return alpha / rank


def _unwrapped(name: str) -> str:
    """A tensor's name in LLaVA's class."""
    for prefix in WRAPPED:
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            break
    return name.removeprefix("model.") if name.startswith("model.model.") else name
