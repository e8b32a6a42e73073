# SPDX-License-Identifier: Apache-2.0
"""A model as a class of Hugging Face's and one file of modelling code, for what is none of its classes.

The code is `modeling_template.py` with this model's constants and class names; the tensors keep their names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import MODEL_MAPPING, PretrainedConfig

from moellava.convert.export import modeling_template
from moellava.convert.export.native import plain_config
from moellava.convert.export.pieces import Piece, Pieces
from moellava.convert.export.source import Source
from moellava.model.extended import base_of

MODULE = "modeling_sparse"

AUTO = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")
"""Auto classes that open the whole model; `AutoModel` opens its body."""

CONSTANTS = re.compile(r"(?<=# constants\n).*(?=# end of constants\n)", re.DOTALL)


def beyond_code(source: Source) -> list[str]:
    """What the file of code has no words for."""
    extension = source.extension
    beyond = [] if extension.towers is None else [extension.towers.reason]
    if extension.projector is not None:
        beyond.append(f"its projector is {extension.projector.name}, which Hugging Face's class lacks")
    return beyond


def code_config(source: Source) -> PretrainedConfig:
    """The config of the new folder, which names its code. The language model's type is disguised: without the code the
    folder would open as a dense model with random MLPs."""
    config = plain_config(source)
    names = class_names(config)
    config.auto_map = {"AutoConfig": f"{MODULE}.{names['TheConfig']}", "AutoModel": f"{MODULE}.{names['TheBody']}"}
    config.auto_map |= dict.fromkeys(AUTO, f"{MODULE}.{names['TheModel']}")
    if source.spec is not None:  # engines take a model for sparse by these
        config.text_config.num_experts = max(layer.n_experts for layer in source.layers)
        config.text_config.num_experts_per_tok = source.spec.top_k_experts
    return config


def class_names(config: Any) -> dict[str, str]:
    """Class in the template -> the class of Hugging Face's that it extends, whose name it takes: servers look at it."""
    return {
        "TheConfig": type(config).__name__,
        "TheBody": MODEL_MAPPING[type(config)].__name__,
        "TheModel": base_of(config.model_type).__name__,
    }


def code_pieces(source: Source) -> Pieces:
    """The tensors of the new folder: those of the source, under the names of their class."""
    return {name: Piece((name,)) for name in source.tensors}


def modeling_code(source: Source) -> str:
    """The file of code."""
    text = Path(modeling_template.__file__).read_text(encoding="utf-8")
    text = CONSTANTS.sub(lambda _: constants(source), text)
    for name, theirs in class_names(plain_config(source)).items():
        text = re.sub(rf"\b{name}\((transformers)\.\w+\)", rf"{name}(\1.{theirs})", text)
        text = re.sub(rf"\b{name}\b", theirs, text)
    return text


def constants(source: Source) -> str:
    """The lines that say what this model is."""
    spec, extension = source.spec, source.extension
    sparse = [layer for layer in source.layers if layer.n_experts] if spec is not None else []
    places = {f"{layer.prefix.removeprefix('model.')}{layer.mlp}": layer.n_experts for layer in sparse}
    lines = [f"LAYERS = {places!r}  # MLP -> its number of experts"]
    if spec is None:
        lines += ['TOP_K, TOP1_GATE = 0, ""', 'INPUTS, OUTPUT, SLICES = (), "", 1']
        lines += ["HAS_SHARED, HAS_MIX, HAS_BIAS = False, False, False"]
    else:
        has_bias = any(module.router.bias is not None for _, module in source.sparse)
        inputs, output = source.linears if spec.granularity > 1 else ((), "")
        lines += [f'TOP_K, TOP1_GATE = {spec.top_k_experts}, "{spec.top1_gate}"']
        lines += [f'INPUTS, OUTPUT, SLICES = {inputs!r}, "{output}", {spec.granularity}']
        lines += [f"HAS_SHARED, HAS_MIX, HAS_BIAS = {source.has_shared}, {spec.use_residual}, {has_bias}"]
    lines += [f"HEAD_BIAS, SOFTCAP = {extension.head_bias}, {extension.softcap}"]
    return "\n".join(lines).replace("'", '"') + "\n"
