# SPDX-License-Identifier: Apache-2.0
"""A run with adapters leaves the merged model, as any stage does, and the adapter alone in peft's format.

adapter/adapter_config.json          peft's
adapter/adapter_model.safetensors    A and B of each adapted linear, and the modules that trained in full
adapter/origin.json                  how the model under it was made: sparse layers, quantisation, template
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from moellava.adapters.lora import NAME, Adapter
from moellava.errors import UserError
from moellava.files import read_object, refuse_pointer, write_digests, write_json, written
from moellava.model.integrity import check_digests, opening
from moellava.model.page import adapter_page, write_page
from moellava.model.parts import Keywords
from moellava.model.saving import apart
from moellava.model.section import Section, section_of
from moellava.model.weights import read_file, todays_name

FOLDER = "adapter"
CONFIG, WEIGHTS, ORIGIN = "adapter_config.json", "adapter_model.safetensors", "origin.json"
OLD_WEIGHTS = "adapter_model.bin"
"""How peft before 0.6 stores the tensors: a pickle, read with `weights_only`."""

PREFIX = "base_model.model."
"""What peft puts before the names of the model that it wraps."""

SAME_BASE = 1e-5
"""Largest difference of two fingerprints of one base, as a fraction: sums in another order."""

VARIANTS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters", "layer_replication")
"""Settings of peft under which W + alpha / r · B A is not what an adapted linear computes."""

_MATRIX = re.compile(rf"(.+)\.lora_[AB]\.{NAME}\.weight")
_BASE = ".base_layer."


def merged(state: dict[str, torch.Tensor], scaling: float) -> dict[str, torch.Tensor]:
    """A state dict without adapters that computes the same: W + scaling · B A in fp32, rounded to W's dtype.

    Args:
        state: of a model with adapters, the whole of it, under the native engine's names.
        scaling: alpha / r.
    """
    result = {}
    for name, value in state.items():
        if _MATRIX.fullmatch(name):
            continue
        if name.endswith(f"{_BASE}weight"):
            linear = name.removesuffix(f"{_BASE}weight")
            a, b = (state[f"{linear}.lora_{part}.{NAME}.weight"].to(value.device).float() for part in "AB")
            value = (value.float() + scaling * (b @ a)).to(value.dtype).cpu()  # a second model has no room on a GPU
        result[name.replace(_BASE, ".")] = value
    return result


def adapter_tensors(state: dict[str, torch.Tensor], adapter: Adapter) -> dict[str, torch.Tensor]:
    """What trained, under peft's names."""
    return {
        PREFIX + name.replace(f".{NAME}.weight", ".weight"): value
        for name, value in state.items()
        if adapter.trains(name)
    }


def fingerprint(state: dict[str, torch.Tensor]) -> float:
    """Sum of the absolute values of the adapted linears: tells whether an adapter is put on what it has learnt on.
    Collective where they are sharded, each process its share of the work."""
    sums = (state[name].double().abs().sum() for name in sorted(state) if name.endswith(f"{_BASE}weight"))
    return float(sum(one.full_tensor() if isinstance(one, DTensor) else one for one in sums))


def check_base(state: dict[str, torch.Tensor], origin: dict[str, Any], base: str) -> None:
    """Raises UserError if an adapter has learnt on other weights. One without an origin cannot be told.

    Args:
        state: of a model with adapters.
        origin: the adapter's.
        base: flag and folder that the model comes from.
    """
    if "fingerprint" not in origin:
        return
    here, there = fingerprint(state), origin["fingerprint"]
    if abs(here - there) > SAME_BASE * there:
        raise UserError(
            f"{base} is not what the adapter has learnt on ({origin['base']} as it was then): the absolute values of "
            f"its adapted linears sum to {here:.6g}, those under the adapter to {there:.6g}. "
            "Give the folder that the run started from; for stage 2 from an LLM and a tower, stage 1's folder."
        )


def write_adapter(state: dict[str, torch.Tensor], adapter: Adapter, path: Path) -> None:
    """Writes `path`, each file whole or not at all.

    Args:
        state: of the model with adapters.
    """
    path.mkdir(parents=True, exist_ok=True)
    with written(path / WEIGHTS) as temporary:
        save_file(apart(adapter_tensors(state, adapter)), temporary, metadata={"format": "pt"})
    description = adapter.config.to_dict() | {"inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in description.items()}
    write_json(path / CONFIG, plain)
    if "fingerprint" not in adapter.origin:  # what it is taken of is frozen
        adapter.origin["fingerprint"] = fingerprint(state)
    write_json(path / ORIGIN, adapter.origin)
    write_page(adapter_page(section_of(adapter.origin) or Section(), str(adapter.origin.get("base", ""))), path, path)
    write_digests(path, (CONFIG, WEIGHTS, ORIGIN))


def read_adapter(path: Path, keywords: Keywords) -> tuple[Adapter, dict[str, torch.Tensor]]:
    """An adapter and its tensors under peft's names. One that peft alone wrote has an empty origin.

    Args:
        path: its folder.
        keywords: of the model that it belongs to.

    Raises:
        UserError: the folder holds no LoRA adapter, a damaged one, or one that is not what was written.
    """
    weights = path / (WEIGHTS if (path / WEIGHTS).is_file() else OLD_WEIGHTS)
    for name in (CONFIG, weights.name):
        if not (path / name).is_file():
            wanted = WEIGHTS if name == OLD_WEIGHTS else name
            raise UserError(f"{path} holds no {wanted}: it is not the folder of an adapter.")
    read_object(path / CONFIG)
    origin = read_object(path / ORIGIN)
    refuse_pointer(weights)
    check_digests(path)
    with opening(f"the adapter {path}"):
        config = LoraConfig.from_pretrained(path)
    if config.peft_type != "LORA":
        raise UserError(f"{path} holds a {config.peft_type} adapter; LoRA is what can be merged here.")
    variants = [name for name in VARIANTS if getattr(config, name)]
    if variants:
        raise UserError(f"{path} holds a variant of LoRA ({', '.join(variants)}) that cannot be merged here.")
    return Adapter(config, origin, keywords), dict(read_file(weights))


def load_adapter(model: nn.Module, adapter: Adapter, tensors: dict[str, torch.Tensor], source: Path) -> None:
    """Copies an adapter's tensors into a model that it is attached to; into a sharded one each process its share.

    Names of before transformers 4.52 are today's, under peft's prefix.

    Raises:
        UserError: the file and the model do not name the same tensors, or differ in their shapes.
    """
    own = adapter_tensors(model.state_dict(), adapter)
    known = {name.removeprefix(PREFIX) for name in own}
    tensors = {PREFIX + todays_name(name.removeprefix(PREFIX), known): value for name, value in tensors.items()}
    different = sorted(own.keys() ^ tensors.keys())
    different += [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if different:
        raise UserError(
            f"{source} does not fit the model: {len(different)} of {len(own)} tensors are missing on one side or of "
            f"another shape, for instance {different[0].removeprefix(PREFIX)}."
        )
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(_laid_out(value, own[name]))


def _laid_out(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor that every process holds whole, sharded as another one is; itself where that is not sharded."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
