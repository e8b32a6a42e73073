# SPDX-License-Identifier: Apache-2.0
"""A model as one of Hugging Face's own classes: its config, and its tensors under the names of the hub."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PretrainedConfig,
)

from moellava.auto_classes import PREFIX
from moellava.convert.export.pieces import Piece, Pieces
from moellava.convert.export.source import Source
from moellava.convert.export.targets import TARGETS, Target
from moellava.model.extended import base_of
from moellava.model.section import note

NOT_SHARED = {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "auto_map"}
"""Fields of a language model's config that say what it is itself."""

LIKE_LLAVA = ("llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "internvl")
"""`model_type`s whose folders on the hub have LLaVA's names."""

ON_THE_HUB = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
)
"""(name in the class, name on the hub) of what a tensor's name begins with. Engines read the second alone."""

WITHOUT_PREFIX = ("clip_vision_model", "siglip_vision_model")
"""Towers that are `vision_model` of their class on the hub, and have no such part in today's transformers."""


def find_native(source: Source, name: str | None = None) -> tuple[str | None, list[str]]:
    """The first target that holds a model.

    Args:
        name: of the one that is wanted; None: any.

    Returns:
        Its name, or `AS_IT_IS` for a dense model of one of Hugging Face's classes; None, and why there is none.
    """
    beyond = replace(source.extension, moe=None).reasons
    if beyond:
        return None, beyond
    if source.spec is None:
        return (AS_IT_IS, []) if name is None else (None, ["it is dense"])
    known = {key: target for key, target in TARGETS.items() if source.text.model_type in target.decoders}
    if name is not None and name not in known:
        return None, [
            f"its decoder is {source.text.model_type}, and {name} has that of {', '.join(TARGETS[name].decoders)}"
        ]
    if not takes_any_decoder(source):
        known = {key: target for key, target in known.items() if target.vlm_type is not None}
    if not known:
        vlm = source.config.model_type.removeprefix(PREFIX)
        return None, [f"no sparse model of Hugging Face's is a {vlm} with a {source.text.model_type} decoder"]
    lacks = {key: target.lacks(source) for key, target in known.items() if name in (None, key)}
    fitting = [key for key, reasons in lacks.items() if not reasons]
    return (fitting[0], []) if fitting else (None, [f"{key}: {', '.join(reasons)}" for key, reasons in lacks.items()])


AS_IT_IS = "as it is"


def takes_any_decoder(source: Source) -> bool:
    """Whether the vision-language model's class builds whatever language model its config names."""
    return getattr(base_of(source.config.model_type).config_class, "sub_configs", {}).get("text_config") is AutoConfig


def native_config(source: Source, target: Target | None) -> PretrainedConfig:
    """The config of the new folder: the vision-language model's own class, or the target's, with another decoder."""
    if target is None:
        return plain_config(source)
    text = CONFIG_MAPPING[target.text_type].from_dict(_text_fields(source, target))
    return plain_config(source, text, target.vlm_type)


def plain_config(source: Source, text: Any = None, vlm_type: str | None = None) -> PretrainedConfig:
    """A config of Hugging Face's class, without the options of experts.

    Args:
        text: the language model's config, where it is not the source's; `architectures` in it is what engines build it
            by.
        vlm_type: `model_type` of the class, where it is not the source's.
    """
    raw = {key: value for key, value in source.config.to_dict().items() if key not in ("moe", "auto_map")}
    base = base_of(source.config.model_type).config_class
    if vlm_type is not None:
        base = CONFIG_MAPPING[vlm_type]
        raw["vision_config"] = raw["vision_config"] | {"model_type": base().vision_config.model_type}
    is_new, text = text is not None, text or source.text
    fields = text.to_dict()
    if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        fields["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING[type(text)].__name__]
    config = base.from_dict(raw | {"text_config": fields, "model_type": base.model_type})
    config.architectures = [base_of(base.model_type).__name__]
    config.dtype = source.config.dtype
    if is_new:
        note(config, family=None)
    return config


def _text_fields(source: Source, target: Target) -> dict[str, Any]:
    """Fields of the target's config: those that it shares with the source's, and those of its routing."""
    given, known = source.text.to_dict(), set(CONFIG_MAPPING[target.text_type]().to_dict())
    shared = {name: value for name, value in given.items() if name in known - NOT_SHARED}
    if given.get("head_dim"):  # not every class lists it, and all read it
        shared["head_dim"] = given["head_dim"]
    return {**shared, **(target.place(source) or {}), **target.fields(source)}


def native_pieces(source: Source, target: Target | None) -> Pieces:
    """The tensors of the new folder, under the names of the hub."""
    pieces = layer_pieces(source, target)
    return {hub_name(name, source.config): piece for name, piece in pieces.items()}


def layer_pieces(source: Source, target: Target | None) -> Pieces:
    """The same under the names of the class, but for experts that it holds in one tensor. What no rule names is as it
    is."""
    if target is None:
        return {name: Piece((name,)) for name in source.tensors}
    inside = {f"{layer.prefix}{name}" for layer in source.layers for name in layer.names if name.startswith(layer.mlp)}
    pieces = {name: Piece((name,)) for name in source.tensors if name not in inside}
    for layer in source.layers:
        changed = target.attention(source, layer) | target.mlp(source, layer)
        pieces |= {layer.prefix + name: piece for name, piece in changed.items()}
    return pieces


def hub_name(name: str, config: Any) -> str:
    """A tensor's name in its class -> its name in folders on the hub."""
    if config.model_type.removeprefix(PREFIX) not in LIKE_LLAVA:
        return name
    for here, there in ON_THE_HUB:
        if name.startswith(here):
            rest = name.removeprefix(here)
            is_tower = there == "vision_tower." and config.vision_config.model_type in WITHOUT_PREFIX
            inner = "vision_model." if is_tower and not rest.startswith("vision_model.") else ""
            return there + inner + rest
    return name
