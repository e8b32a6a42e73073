# SPDX-License-Identifier: Apache-2.0
"""`moellava upcycle` without holding the model: tensors go from the dense files to the sparse ones one by one.

The sparse folder's names, shapes and places are known before the first tensor is read, so each is written where it
belongs as soon as it is there. In memory at once: the shard that is being read (mapped), and one layer's dense MLP with
the expert that is being made from it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from moellava.convert.tensor_files import TensorFiles
from moellava.errors import UserError
from moellava.files import CONFIG, NOT_OF_THE_MODEL, STAGING, staged
from moellava.heap import give_back_above
from moellava.log import get_logger
from moellava.model.build import check_loaded, class_of
from moellava.model.description import Description
from moellava.model.extended import as_extended
from moellava.model.offload import without_weights
from moellava.model.page import folder_page, write_page
from moellava.model.saving import check_room, remove_old_weights, without_ties
from moellava.model.section import note, note_plugins, plugins_of
from moellava.model.weights import file_dtypes, headers, locate, read_all, weight_files
from moellava.moe import MoESpec
from moellava.moe.decoder import decoder_layers, mlp_names
from moellava.moe.upcycle import expert_stream
from moellava.plugins import write_plugins

logger = get_logger(__name__)


WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".npz"),
    *(".gguf", ".onnx", ".onnx_data", ".tflite", ".mlmodel"),
)
"""Endings of weights, of any library: those of the dense model are not the sparse one's."""

NOT_COPIED = {*NOT_OF_THE_MODEL, CONFIG, "run.yaml", "run.log", "run_log.jsonl", "report.html"}
"""What the new folder has of its own, and what tells of the run that made the dense one."""

TEMPLATES = "additional_chat_templates"
"""The one folder among a tokenizer's files."""


def convert_files(
    source: Path,
    target: Path,
    dense: Any,
    sparse: Any,
    spec: MoESpec,
    shard_bytes: int,
    certify: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes the sparse folder of a dense one.

    Args:
        source: a folder of safetensors whose names are those of its model class.
        target: the new folder; its weights appear when all of them are there, `config.json` last.
        dense, sparse: both models without memory; the sparse one is of `sparse_config`.
        spec: options.
        shard_bytes: largest file of the new folder.
        certify: looks at what has been written before it moves to its place; what it raises leaves nothing there.

    Raises:
        UserError: pickled weights, or names and shapes that are not the config's.
        OSError: the disk is full, or has no room for the weights; the target is as it was.
    """
    give_back_above(2**20)
    digests: dict[str, str] = {}
    with staged(target, STAGING, digests) as staging:
        digests |= _convert(source, staging, dense, sparse, spec, shard_bytes)
        copy_others(source, staging)
        if (source / TEMPLATES).is_dir():
            shutil.copytree(source / TEMPLATES, staging / TEMPLATES)
        write_plugins(plugins_of(sparse.config), staging)
        sparse.config.save_pretrained(staging)
        write_page(folder_page(sparse.config), staging, target)
        certify(staging)
        names = {file.name for file in staging.iterdir()}
    remove_old_weights(target, names)


def copy_others(source: Path, target: Path, replaced: Collection[str] = ()) -> None:
    """Copies the files of a dense folder that are neither weights nor of its run alone: a licence, notes, a tokenizer.

    Args:
        replaced: patterns of names that the target has of its own, or does without.
    """
    for file in source.iterdir():
        is_own = file.name in NOT_COPIED or any(map(file.match, replaced))
        if file.is_file() and not is_own and not file.name.endswith(WEIGHT_SUFFIXES):
            shutil.copy2(file, target / file.name)


def sparse_config(config: PretrainedConfig, spec: MoESpec) -> PretrainedConfig:
    """The new folder's config."""
    sparse = type(config).from_dict(config.to_dict())
    sparse.moe = spec.to_config()
    note(sparse, stage="moe")
    note_plugins(sparse)
    sparse = as_extended(sparse)
    sparse.architectures = [class_of(sparse).__name__]
    return sparse


def _convert(source: Path, target: Path, dense: Any, sparse: Any, spec: MoESpec, limit: int) -> dict[str, str]:
    """Writes the weights; returns the digests of the files."""
    places = locate(weight_files(source), dense)
    layers = decoder_layers(dense)
    counts, mlps = spec.layers_of(len(layers)), _mlp_names(dense, spec)
    planned = _planned(sparse, file_dtypes(places), mlps)
    check_room(target, planned)
    output = TensorFiles(target, _as_written(planned, list(places), mlps), limit, digested=True)
    layer_of = {f"{prefix}{part}": index for index, (prefix, parts) in mlps.items() for part in parts}
    waiting: dict[int, dict[str, Tensor]] = {index: {} for index in mlps}
    for name, tensor in read_all(places):
        if name not in layer_of:
            output.write(name, tensor)
            continue
        index = layer_of[name]
        prefix, parts = mlps[index]
        waiting[index][name.removeprefix(prefix)] = tensor
        if len(waiting[index]) < len(parts):
            continue
        mlp = getattr(layers[index], prefix.removesuffix(".").rpartition(".")[2])
        mlp.load_state_dict(waiting.pop(index), assign=True)
        for part, tensor in expert_stream(mlp, spec, counts[index], index):
            output.write(f"{prefix}{part}", tensor)
        mlp.to("meta")
        del tensor  # it holds the file's mapping
        logger.info("Layer %d has %d experts", index, counts[index])
    if output.missing:
        raise UserError(f"{source} lacks tensors of its config.json: {', '.join(sorted(output.missing)[:5])} …")
    return output.digests


def _as_written(
    planned: dict[str, Tensor], read: list[str], mlps: dict[int, tuple[str, list[str]]]
) -> dict[str, Tensor]:
    """The tensors of the new folder in the order in which they come, when those of the dense one are `read` in theirs:
    a sparse layer's after the last of its MLP."""
    place = {name: number for number, name in enumerate(read)}
    for prefix, parts in mlps.values():
        end = max(place.get(prefix + part, 0) for part in parts)
        place |= {name: end for name in planned if name.startswith(prefix)}
    return dict(sorted(planned.items(), key=lambda item: place.get(item[0], len(read))))


def streamed(description: Description) -> Any | None:
    """The model of a folder, without its weights, where they can be read one by one: where it holds safetensors whose
    names are those of its model class, of today or of the hub. None elsewhere.

    Raises:
        UserError: some tensors are not there, or of another shape than the config says, or of a dtype that is none.
    """
    files = weight_files(description.folder) if description.streams else []
    if not files or any(file.suffix != ".safetensors" for file in files):
        return None
    model = without_weights(description.config)
    places, state = locate(files, model), model.state_dict()
    if not set(places) <= set(state):
        return None
    found = headers(places)
    differ = [(name, each.shape, state[name].shape) for name, each in found.items() if each.shape != state[name].shape]
    missing = without_ties(model, state).keys() - found.keys()
    info = {"missing_keys": missing, "unexpected_keys": [], "mismatched_keys": differ}
    check_loaded(info, str(description.folder))
    return model


def _mlp_names(dense: nn.Module, spec: MoESpec) -> dict[int, tuple[str, list[str]]]:
    """layer index -> (name of its MLP with a trailing dot, names of its tensors)."""
    names = {id(module): name for name, module in dense.named_modules()}
    layers = decoder_layers(dense)
    called = mlp_names(dense, list(spec.layers_of(len(layers))))
    mlps = {index: getattr(layers[index], name) for index, name in called.items()}
    return {index: (f"{names[id(mlp)]}.", list(mlp.state_dict())) for index, mlp in mlps.items()}


PLACE_IN_LAYER = re.compile(r"^(experts\.\d+|shared)\.")
"""What stands before the name that a tensor has in the dense MLP."""


def _planned(
    sparse: nn.Module, dtypes: dict[str, torch.dtype], mlps: dict[int, tuple[str, list[str]]]
) -> dict[str, Tensor]:
    """Every tensor of the new folder, empty, with the dtype of what it comes from; routers are fp32, and what has no
    counterpart in the dense MLP is as its first tensor is."""
    tied = {"lm_head.weight"} if getattr(sparse.config.get_text_config(), "tie_word_embeddings", False) else set()
    planned = {}
    for name, tensor in sparse.state_dict().items():
        dtype = dtypes.get(name)
        if dtype is None and name in tied:
            continue
        for prefix, parts in mlps.values():
            if name.startswith(prefix):
                part = name.removeprefix(prefix)
                dtype = dtypes.get(prefix + PLACE_IN_LAYER.sub("", part), dtypes.get(prefix + parts[0]))
                dtype = tensor.dtype if part.startswith("router.") else dtype
        planned[name] = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="meta")
    return planned
