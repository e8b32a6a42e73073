# SPDX-License-Identifier: Apache-2.0
"""`moellava export`: any folder -> one that opens without moellava, with its proof."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from moellava.convert.export import AUTO, CODE
from moellava.convert.export.code import MODULE, beyond_code, code_config, code_pieces, modeling_code
from moellava.convert.export.native import find_native, native_config, native_pieces
from moellava.convert.export.page import exported_page
from moellava.convert.export.pieces import Pieces, write_pieces
from moellava.convert.export.proof import Certificate, class_named, prove, reopen, said_by
from moellava.convert.export.source import Source, opened_source
from moellava.convert.export.targets import TARGETS
from moellava.errors import UserError
from moellava.files import CONFIG, STAGING, staged
from moellava.log import get_logger
from moellava.model.build import on_meta
from moellava.model.description import Description
from moellava.model.extended import REMOTE
from moellava.model.manifest import Manifest
from moellava.model.page import write_page
from moellava.model.saving import write_inputs
from moellava.vlm import build, describe

logger = get_logger(__name__)


GENERATION = "generation_config.json"


def export_folder(
    manifest: Manifest,
    target: Path,
    to: str = AUTO,
    verify: bool = True,
    shard_bytes: int = 4 * 10**9,
    dropless: bool = False,
) -> Certificate | None:
    """Writes a model as one of Hugging Face's classes, or as one with a file of code. Tensors go from file to file one
    by one; the proof holds one model at a time.

    Args:
        manifest: of the folder.
        target: the new folder.
        to: `AUTO`, `NATIVE`, `CODE` or the name of a target.
        verify: reopen the new folder and compare.
        shard_bytes: largest file of the new folder.
        dropless: write a model whose experts drop tokens as what it is where they drop none.

    Returns:
        The proof; None without one.

    Raises:
        UserError: the model is none of these, or has what no folder without moellava can say; reasons are named.
        NotProvenError: the new folder computes something else; nothing of it is left.
    """
    manifest.require_start()
    description = describe(manifest)
    tokenizer, processor = description.inputs()
    if tokenizer is None:
        raise UserError(f"{manifest.called} holds no tokenizer. Copy the files of the language model's into it.")
    digests: dict[str, str] = {}
    with staged(target, STAGING, digests) as staging:
        with opened_source(description, manifest.called) as source:
            require_dropless(source, dropless)
            name = choose(source, to)
            config, pieces = as_code(source, staging) if name == CODE else as_native(source, name)
            digests |= write_pieces(pieces, source, staging, shard_bytes)
        write_config(config, staging, REMOTE if name == CODE else "")
        write_generation_config(config, description, staging)
        write_inputs(tokenizer, processor, staging)
        del source
        certificate = proven(description, manifest.called, staging, name, config) if verify else None
        if certificate is not None:
            certificate.save(staging)
        write_page(exported_page(config, name, certificate, manifest.called), staging, target)
    return certificate


def require_dropless(source: Source, dropless: bool) -> None:
    """Raises UserError for experts that drop tokens, unless the model is wanted as it is without that."""
    drops = source.spec is not None and source.spec.drop_tokens
    if dropless and not drops:
        raise UserError(f"--dropless True: {source.called} drops no tokens. Leave the flag out.")
    if drops and not dropless:
        raise UserError(
            f"{source.called} drops tokens beyond an expert's capacity (drop_tokens, eval_capacity_factor "
            f"{source.config.moe['eval_capacity_factor']}), so that an answer depends on what else is in the batch. "
            "No engine does that. --dropless True writes it without: every token then reaches all its experts."
        )


def choose(source: Source, to: str) -> str:
    """What a model is written as: the name of a target, or `CODE`. Raises UserError where it cannot be."""
    if to != CODE:
        native, reasons = find_native(source, to if to in TARGETS else None)
        if native is not None:
            return native
        if to != AUTO:
            raise _refusal(source, to, reasons)
        logger.info(
            "No native class holds %s: %s. It is written with a file of code.", source.called, "; ".join(reasons)
        )
    if beyond := beyond_code(source):
        raise _refusal(source, to, beyond)
    return CODE


def _refusal(source: Source, to: str, reasons: Iterable[str]) -> UserError:
    return UserError(f"--to {to}: {source.called} cannot be written so: {'; '.join(reasons)}.")


def written_as(description: Description, called: str) -> str:
    """What a folder would be written as, without its weights. Raises UserError: see `export_folder`."""
    model = on_meta(description.config)
    tensors = model.state_dict()
    source = Source(called, description.config, model, tensors, tensors.__getitem__, description)
    require_dropless(source, dropless=False)
    return choose(source, AUTO)


def as_native(source: Source, name: str) -> tuple[Any, Pieces]:
    """Config and tensors of one of Hugging Face's classes."""
    target = TARGETS.get(name)
    return native_config(source, target), native_pieces(source, target)


def as_code(source: Source, folder: Path) -> tuple[Any, Pieces]:
    """Config and tensors of a class with a file of code, which is written."""
    (folder / f"{MODULE}.py").write_text(modeling_code(source), encoding="utf-8")
    return code_config(source), code_pieces(source)


def write_config(config: Any, folder: Path, disguise: str) -> None:
    """Writes the config, with `disguise` before the language model's type."""
    config.save_pretrained(folder)
    if disguise:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        content["text_config"]["model_type"] = disguise + content["text_config"]["model_type"]
        (folder / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_generation_config(config: Any, description: Description, folder: Path) -> None:
    """Writes how answers are decoded: what the source says, or what follows from the config."""
    given = description.folder / GENERATION
    if given.is_file():
        shutil.copyfile(given, folder / GENERATION)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(folder)


def proven(description: Description, called: str, folder: Path, name: str, config: Any) -> Certificate:
    """The proof of a folder that is written. One model at a time is in memory: ours, then that of another process."""
    vlm = build(description, torch.float32, called)
    probes, ours = said_by(vlm)
    del vlm
    gc.collect()
    return prove(probes, ours, reopen(folder, probes, name == CODE), folder, name, class_named(config))
