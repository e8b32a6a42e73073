"""`moellava upcycle`: a dense folder -> a sparse one, with its certificate, without training."""

from __future__ import annotations

import argparse
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from moellava.errors import UserError
from moellava.lmm.folders import Probes, is_released, mark_released, open_folder, released_probes
from moellava.lmm.processors import load_processor
from moellava.lmm.supported_models import LMMFamily, lmm_family_of, refuse_upcycling
from moellava.model.builder import config_kind, is_published, save_pretrained_folder
from moellava.model.extended import extend_in_place
from moellava.model.offload import run_from_disk
from moellava.model.probe import probe_batches
from moellava.model.sources import read_config, resolve_folder
from moellava.model.streaming import can_stream, on_meta, read_dense_config, sparse_config, upcycle_folder
from moellava.moe import MoESpec
from moellava.moe.certificate import Certificate, compare, dense_logits, forward_of, upcycle_certified

GIGABYTE = 10**9


def main(argv: list[str]) -> int:
    """Runs the command; the certificate goes to stdout and into the new folder."""
    arguments = parse(argv)
    target = Path(arguments.output_dir)
    if (target / "config.json").exists():
        raise UserError(f"--output-dir {target} already holds a model. Choose another folder, or remove it.")
    source = resolve_folder(arguments.model_path, "--model-path")
    raw = read_config(source, "--model-path")
    family = family_of(raw, arguments.model_path)
    spec = spec_of(arguments)
    config = None if is_published(raw) else dense_config(source, raw, family)
    if config is not None and can_stream(source, config):
        shard_bytes = int(arguments.shard_size * GIGABYTE)
        certificate = stream(source, target, config, spec, shard_bytes, probes_of(source, config, family))
    else:
        certificate = in_memory(source, target, spec, (config and config.dtype) or torch.float32)
    certificate.save(target)
    print("\n".join([*certificate.lines(), f"Written to {target}"]))
    certificate.check()
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command's flags: its own, and one for each field of `MoESpec`."""
    parser = argparse.ArgumentParser(prog="moellava upcycle", description=__doc__)
    parser.add_argument("--model-path", required=True, help="dense folder: of stage 2, released, or published")
    parser.add_argument("--output-dir", required=True, help="new folder")
    parser.add_argument("--shard-size", type=float, default=4.0, help="largest file of the new folder, in GB")
    parser.add_argument("--moe_preset", default="today", help="'moe-llava': the original's routing and loss")
    hints = typing.get_type_hints(MoESpec)
    for field in fields(MoESpec):
        default = getattr(MoESpec(), field.name)
        kind = hints[field.name]
        names = [f"--{field.name}"] + ([f"--{field.name.replace('_', '-')}"] if "_" in field.name else [])
        if kind is bool:
            parser.add_argument(*names, nargs="?", const=True, type=_truth, help=f"default {default}")
        elif kind in (int, float, str):
            parser.add_argument(*names, type=kind, help=f"default {default}")
        else:
            parser.add_argument(*names, type=int, nargs="+", help=f"default {default}")
    return parser.parse_args(argv)


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def spec_of(arguments: argparse.Namespace) -> MoESpec:
    """The options; a capacity factor alone means that experts drop what exceeds it, as in `train.py`."""
    given = {f.name: value for f in fields(MoESpec) if (value := getattr(arguments, f.name)) is not None}
    if "capacity_factor" in given or "eval_capacity_factor" in given:
        given.setdefault("drop_tokens", True)
    return MoESpec.from_preset(arguments.moe_preset, **given)


def family_of(raw: dict[str, Any], path: str) -> LMMFamily | None:
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
    family = lmm_family_of(raw, f"--model-path {path}")
    refuse_upcycling(family, f"--model-path {path}")
    return family


def dense_config(source: Path, raw: dict[str, Any], family: LMMFamily | None) -> PretrainedConfig:
    """The config of a folder in Hugging Face's layout; a released model's says so, for the sparse folder's sake."""
    config = read_dense_config(source, raw)
    if family is not None:
        mark_released(config, family)
    return config


def probes_of(source: Path, config: PretrainedConfig, family: LMMFamily | None) -> Probes:
    """What both models are run on. LLaVA's kind is probed by its config alone, others by their processor."""
    dtype = config.dtype or torch.float32
    if family is None or config.model_type == "llava":
        return probe_batches(config, dtype)
    return released_probes(config, load_processor(source, family), family, dtype)


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
