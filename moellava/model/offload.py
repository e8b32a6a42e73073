# SPDX-License-Identifier: Apache-2.0
"""Runs a model whose weights stay on the disk, for comparing models that do not fit into memory, as certificates of
`moellava upcycle` do.

Where the files hold them in the dtype that is computed in, they are mapped: pages come when they are read, and the
system takes them back when it needs the memory. Elsewhere each module's are read and cast when it is called, and
dropped after it, which is slow.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, init_empty_weights
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from transformers import PretrainedConfig
from transformers.initialization import no_init_weights

from moellava.model.build import class_of
from moellava.model.weights import Place, file_dtypes, locate, read_all, weight_files

HEAD = "lm_head.weight"
ROUTER = ".router."

READ_AT_ONCE = ["MultiheadAttention", "MllamaVisionModel"]
"""Classes that look at the weights of modules inside them without calling those."""


def without_weights(config: PretrainedConfig) -> Any:
    """The model of a config, in evaluation mode, whose weights are still to come: they take no memory."""
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = class_of(config)(config).eval()
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # drawing numbers that are not kept takes longer than all else
    model.init_weights()  # what some classes compute there: constants in buffers
    return model


def run_from_disk(folder: Path, model: nn.Module, dtype: torch.dtype) -> None:
    """Lets a model run over the safetensors of a folder, for forwards on the CPU. `let_go` undoes it.

    Args:
        folder: weights under the names of the model class.
        model: of `without_weights`.
        dtype: of the weights in the files; routers are fp32.
    """
    model.to(dtype)
    places = locate(weight_files(folder), model)
    if mapped(model, places, dtype):
        return
    index = {
        name: {
            "safetensors_file": str(place.file),
            "weight_name": place.name,
            "dtype": str(dtype).removeprefix("torch."),
        }
        for name, place in places.items()
    }
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # small, and accelerate leaves buffers where they are
            set_module_tensor_to_device(model, name, "cpu", value=places[name].read())
    if HEAD not in index:  # it is the embedding itself, and is read from there
        embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
        index[HEAD] = index[f"{embedding}.weight"]
    dispatch_model(
        model,
        device_map={"": "disk"},
        main_device="cpu",
        offload_index=index,
        force_hooks=True,
        preload_module_classes=READ_AT_ONCE,
    )


def let_go(model: nn.Module) -> None:
    """Takes the files away again: what is left is the structure, without memory."""
    remove_hook_from_submodules(model)
    model.to("meta")


def mapped(model: nn.Module, places: Mapping[str, Place], dtype: torch.dtype) -> bool:
    """Gives a model without memory the tensors of safetensors files as they lie there. False, and nothing is changed,
    where files lack some of them, or hold other than routers in another dtype."""
    lacking, tied = set(model.state_dict()) - set(places), model.config.get_text_config().tie_word_embeddings
    other = [name for name, found in file_dtypes(places).items() if found != dtype and ROUTER not in name]
    if other or lacking - ({HEAD} if tied else set()):
        return False
    model.load_state_dict(dict(read_all(places)), strict=False, assign=True)
    if lacking:
        model.tie_weights()
    return True
