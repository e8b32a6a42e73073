"""A model as one of Hugging Face's own classes: its config, and its tensors under the names of the hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PretrainedConfig,
)

from moellava.convert.export.pieces import Piece, Pieces
from moellava.convert.export.source import Source
from moellava.convert.export.targets import TARGETS, Target
from moellava.errors import UserError
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


def native_target(source: Source, name: str | None = None) -> tuple[Target | None, str]:
    """The first target that holds a model.

    Args:
        name: of the one that is wanted; None: any.

    Returns:
        The target, None for a dense model that is one of Hugging Face's class already; and its name.

    Raises:
        UserError: there is none; the reasons are named.
    """
    beyond = [reason for reason in source.extension.reasons if source.spec is None or reason != MOE_REASON]
    if beyond:
        raise UserError(f"{source.called} is no class of Hugging Face's: {'; '.join(beyond)}.")
    if source.spec is None:
        if name is not None:
            raise UserError(f"--to {name}: {source.called} is dense. Leave the flag out.")
        return None, type(source.config).__name__
    if name is None and not takes_any_decoder(source) and not _of_its_own(source):
        raise UserError(f"{source.called}: a {source.config.model_type} model takes no language model but its own.")
    lacks = {key: target.lacks(source) for key, target in TARGETS.items() if name in (None, key)}
    fitting = [key for key, reasons in lacks.items() if not reasons]
    if not fitting:
        said = [f"{key}: {', '.join(reasons)}" for key, reasons in lacks.items()]
        raise UserError(f"{source.called} is none of Hugging Face's sparse models ({'; '.join(said)}).")
    return TARGETS[fitting[0]], fitting[0]


MOE_REASON = "its decoder has Mixture-of-Experts layers"


def takes_any_decoder(source: Source) -> bool:
    """Whether the vision-language model's class builds whatever language model its config names."""
    return getattr(base_of(source.config.model_type).config_class, "sub_configs", {}).get("text_config") is AutoConfig


def _of_its_own(source: Source) -> bool:
    """Whether a target brings a class for such a vision-language model."""
    return any(target.vlm_type and source.text.model_type in target.decoders for target in TARGETS.values())


def native_config(source: Source, target: Target | None) -> PretrainedConfig:
    """The config of the new folder: the vision-language model's own class, or the target's, with another language model.

    `text_config.architectures` is what engines build the language model by.
    """
    raw = {key: value for key, value in source.config.to_dict().items() if key not in ("moe", "auto_map")}
    plain = base_of(source.config.model_type).config_class
    text = source.text
    if target is not None:
        text = CONFIG_MAPPING[target.text_type].from_dict(_text_fields(source, target))
        if target.vlm_type is not None:
            plain = CONFIG_MAPPING[target.vlm_type]
    text.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(text)].__name__] if _has_head(text) else None
    raw |= {"text_config": text.to_dict(), "model_type": plain.model_type}
    if target is not None and target.vlm_type is not None:
        raw["vision_config"] = raw["vision_config"] | {"model_type": plain().vision_config.model_type}
    config = plain.from_dict(raw)
    config.architectures = [base_of(plain.model_type).__name__]
    config.dtype = source.config.dtype
    if target is not None:
        note(config, family=None)
    return config


def _has_head(text: Any) -> bool:
    return type(text) in MODEL_FOR_CAUSAL_LM_MAPPING


def _text_fields(source: Source, target: Target) -> dict[str, Any]:
    """Fields of the target's config: those that it shares with the source's, and those of its routing."""
    given, known = source.text.to_dict(), set(CONFIG_MAPPING[target.text_type]().to_dict())
    shared = {name: value for name, value in given.items() if name in known - NOT_SHARED}
    if given.get("head_dim"):  # not every class lists it, and all read it
        shared["head_dim"] = given["head_dim"]
    return {**shared, **(target.place(source) or {}), **target.fields(source)}


def native_pieces(source: Source, target: Target | None) -> Pieces:
    """The tensors of the new folder, in the order of the source's: those of the layers where its layers are."""
    pieces: Pieces = {}
    if target is None:
        pieces = {name: Piece((name,)) for name in source.tensors}
    else:
        inside = {layer.prefix + name: layer for layer in source.layers for name in layer.names}
        for name in source.tensors:
            layer = inside.get(name)
            if layer is None:
                pieces[name] = Piece((name,))
                continue
            own = name.removeprefix(layer.prefix)
            if not own.startswith(f"{layer.mlp}."):
                pieces[name] = Piece((name,))
        for layer in source.layers:
            changed = target.attention(source, layer) | target.mlp(source, layer)
            pieces |= {layer.prefix + name: piece for name, piece in changed.items()}
    return {hub_name(name, source.config): piece for name, piece in pieces.items()}


def hub_name(name: str, config: Any) -> str:
    """A tensor's name in its class -> its name in folders on the hub."""
    if config.model_type.removeprefix("moellava_") not in LIKE_LLAVA:
        return name
    for here, there in ON_THE_HUB:
        if name.startswith(here):
            rest = name.removeprefix(here)
            is_tower = there == "vision_tower." and config.vision_config.model_type in WITHOUT_PREFIX
            inner = "vision_model." if is_tower and not rest.startswith("vision_model.") else ""
            return there + inner + rest
    return name


def layer_note(source: Source, target: Target | None) -> Mapping[str, int]:
    """Decoder layers, and how many of them are sparse."""
    sparse = sum(1 for layer in source.layers if layer.n_experts) if target is not None else 0
    return {"layers": len(source.layers), "sparse": sparse}
