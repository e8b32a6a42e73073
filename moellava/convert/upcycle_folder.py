"""A dense folder -> a sparse one, with its certificate, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from moellava.convert.streaming import on_meta, read_dense_config, sparse_config, upcycle_folder
from moellava.errors import UserError
from moellava.lmm.architecture import Architecture, architecture_of, refuse_upcycling
from moellava.lmm.folders import Probes, is_released, mark_released, open_folder, released_probes
from moellava.lmm.processors import load_processor
from moellava.model.builder import config_kind, save_pretrained_folder
from moellava.model.extended import extend_in_place
from moellava.model.offload import run_from_disk
from moellava.model.probe import probe_batches
from moellava.moe import MoESpec
from moellava.moe.certificate import Certificate, compare, dense_logits, forward_of, upcycle_certified


def family_of(raw: dict[str, Any], path: str) -> Architecture | None:
    """The family of a released model; None for a composed one.

    Raises:
        UserError: the folder is no dense vision-language model, or is of a family that cannot be upcycled here.
    """
    released = is_released(raw)
    kind = ("moe" if raw.get("moe") else "dense") if released else config_kind(raw)
    reason = {
        "moe": "is sparse already. `train.py --moe_enable True` trains it further.",
        "llm": "is a language model without a vision tower. Stage 1 composes the two: train.py --version plain.",
        "tower": "is a vision tower. Give the folder of a dense vision-language model.",
    }
    if kind in reason:
        raise UserError(f"--model-path {path} {reason[kind]}")
    if not released:
        return None
    family = architecture_of(raw, f"--model-path {path}")
    refuse_upcycling(family, f"--model-path {path}")
    return family


def dense_config(source: Path, raw: dict[str, Any], family: Architecture | None) -> PretrainedConfig:
    """The config of a folder in Hugging Face's layout; a released model's says so, for the sparse folder's sake."""
    config = read_dense_config(source, raw)
    if family is not None:
        mark_released(config, family)
    return config


def probes_of(source: Path, config: PretrainedConfig, family: Architecture | None) -> Probes:
    """What both models are run on. LLaVA's kind is probed by its config alone, others by their processor."""
    dtype = config.dtype or torch.float32
    if family is None or config.model_type == "llava":
        return probe_batches(config, dtype)
    return released_probes(config, load_processor(source, family, config.model_type), family, dtype)


def stream(
    source: Path, target: Path, config: PretrainedConfig, spec: MoESpec, shard_bytes: int, probes: Probes
) -> Certificate:
    """Converts and certifies file by file: neither model is ever whole in memory."""
    dtype, sparse = config.dtype or torch.float32, sparse_config(config, spec)
    on_meta(sparse)  # a decoder that cannot be cut into experts says so before anything is computed
    dense = dense_logits(forward_of(run_from_disk(source, config, dtype)), probes)
    upcycle_folder(source, target, config, spec, shard_bytes)
    return compare(forward_of(run_from_disk(target, sparse, dtype)), probes, dense, spec, dtype)


def in_memory(source: Path, target: Path, spec: MoESpec, dtype: torch.dtype) -> Certificate:
    """The same for folders whose layout is not Hugging Face's: opened, converted and written as a whole."""
    opened = open_folder(source, dtype)
    certificate = upcycle_certified(opened.model, spec, opened.probes())
    opened.model.config.moe = spec.to_config()
    extend_in_place(opened.model)
    save_pretrained_folder(opened.model, opened.tokenizer, opened.processor, target, meta={"stage": "moe"})
    return certificate
