# SPDX-License-Identifier: Apache-2.0
"""One complete folder, or the old one: weights, config, tokenizer, processor, and a page that says how to open it.

Everything is first written beside the target, on the same disk, and flushed. Only then do the files move, `config.json`
last. So a full disk stops the save while the old folder is whole.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from moellava.files import STAGING, flush, staged
from moellava.model.extended import extend_in_place, extension_of
from moellava.model.page import folder_page, write_page
from moellava.model.section import note, plugins_of
from moellava.plugins import write_plugins

MAX_SHARD_SIZE = "4GB"
INDEX = "model.safetensors.index.json"


def save_pretrained_folder(
    model: Any,
    tokenizer: Any,
    processor: Any,
    path: str | Path,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    meta: Mapping[str, Any] | None = None,
    shard_bytes: int | None = None,
    beside: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes a folder that chat, the next stage and, where the model allows it, plain transformers open.

    Args:
        model: a composed model, dense or sparse.
        tokenizer, processor: saved beside it.
        path: the folder; other files in it stay.
        state_dict: the whole model's tensors under its own names, experts by their global index, where this process
            does not hold them all (`gather_moe_state_dict`). Default: `model.state_dict()`.
        meta: added to the config's `moellava` section (`stage`, `version` …).
        shard_bytes: largest file of weights; None: `MAX_SHARD_SIZE`.
        beside: puts further files there, before all of them move to their places.

    Raises:
        OSError: the disk is full or cannot be written; what the folder held before is untouched.
    """
    path = Path(path)
    note_meta(model, meta or {})
    state = model.state_dict() if state_dict is None else state_dict
    # What is saved may be of a lower precision than what trains.
    model.config.dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    try:
        with staged(path, STAGING) as staging:
            check_room(staging, state)
            write_weights(staging, without_ties(model, state), shard_bytes)
            model.config.save_pretrained(staging)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(staging)
            write_inputs(tokenizer, processor, staging)
            write_plugins(plugins_of(model.config), staging)
            write_page(folder_page(model.config), staging, path)
            beside(staging)
            names = {file.name for file in staging.iterdir()}
    except SafetensorError as error:
        raise OSError(errno.EIO, f"cannot write weights: {error}", str(path)) from error
    remove_old_weights(path, names)


def note_meta(model: Any, meta: Mapping[str, Any]) -> None:
    """Brings the config up to what the model now is: its sparse layers, and what the stage says of itself."""
    note(model.config, **meta)
    if extension_of(model.config).reasons:
        extend_in_place(model)
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]  # FSDP2 derives a class of each
    model.config.dtype = next(model.parameters()).dtype


def write_inputs(tokenizer: Any, processor: Any, folder: Path) -> None:
    """Writes what makes the model's inputs."""
    # Both write chat_template.jinja, and a base model's or an earlier stage's own would outlive this stage's.
    tokenizer.chat_template = processor.chat_template
    forget_last_call(tokenizer)
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def forget_last_call(tokenizer: Any) -> None:
    """Takes off how the last call has padded and cut, which a fast tokenizer keeps and would write to its file."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()


def without_ties(model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors to write: a head that is the embedding is stored once, under the embedding's name."""
    state = dict(state)
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        state.pop("lm_head.weight", None)
    return state


def check_room(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Raises OSError before anything is written if the disk cannot hold the weights."""
    needed = sum(tensor.nbytes for tensor in state.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"the model needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free", str(folder.parent)
        )


def apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same numbers, no two names over the same memory, which safetensors refuses to write."""
    result: dict[str, torch.Tensor] = {}
    places = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        result[name] = tensor.clone() if tensor.data_ptr() in places else tensor
        places.add(tensor.data_ptr())
    return result


def write_weights(folder: Path, state: Mapping[str, torch.Tensor], shard_bytes: int | None = None) -> None:
    """Writes safetensors of at most so many bytes, and an index where there is more than one."""
    split = split_torch_state_dict_into_shards(dict(state), max_shard_size=shard_bytes or MAX_SHARD_SIZE)
    for name, keys in split.filename_to_tensors.items():
        save_file(apart({key: state[key] for key in keys}), folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # safetensors writes through a private temporary file
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def remove_old_weights(folder: Path, names: Collection[str]) -> None:
    """Removes weights of an earlier save that the files `names` of the latest one have not replaced."""
    for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
        if old.name not in names:
            old.unlink(missing_ok=True)
    flush(folder)
