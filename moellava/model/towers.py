# SPDX-License-Identifier: Apache-2.0
"""Vision towers: any vision model that gives a row of patches, from its own folder or from that of an image-text model.

What a tower gives is found by probes (`tower_probes.py`); its pictures are made by `tower_images.py`; what Hugging
Face's class lacks for some is in `joined_towers.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    MetaClip2VisionConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from moellava.auto_classes import PREFIX
from moellava.errors import UnknownNameError, UserError
from moellava.log import get_logger
from moellava.model.joined_towers import JoinedTowersConfig, join, joined_shape
from moellava.model.probes import FAILURES
from moellava.model.projectors import ProjectorSpec, Sizes
from moellava.model.stored import dtype_of_part
from moellava.model.tower_images import canvas_of
from moellava.model.tower_probes import (
    PIXELS,
    CannotBeTowerError,
    TowerShape,
    random_images,
    shape_of,
    side_of,
    states_of,
)
from moellava.model.weights import weight_files

logger = get_logger(__name__)

SAME_AS: dict[type[PretrainedConfig], type[PretrainedConfig]] = {MetaClip2VisionConfig: CLIPVisionConfig}
"""Configs that AutoModel has no class for -> those of a class that computes the same with the same tensors."""

SELECT_FEATURES = ("patch", "cls_patch", "full")
"""`--mm_vision_select_feature`: the patches; the class token and the patches; all tokens, registers among them."""


def is_tower(model_type: str) -> bool:
    """Whether transformers' class of a type is a vision model, or an image-text model with two separate halves."""
    if model_type.startswith(PREFIX) or model_type not in CONFIG_MAPPING:
        return False
    config = CONFIG_MAPPING[model_type]
    if holds_language_model(config):
        return False
    if config in SAME_AS or is_whole(config):
        return True
    try:
        model = MODEL_MAPPING.get(config, None)
        model = model[0] if isinstance(model, tuple) else model
        return model is not None and PIXELS in list(inspect.signature(model.forward).parameters)[1:2]
    except FAILURES:  # of a library that it needs and that is not installed
        return False


def holds_language_model(config: Any) -> bool:
    """Whether transformers has a class that writes text for a config class."""
    return config in MODEL_FOR_CAUSAL_LM_MAPPING or config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def is_whole(config: Any) -> bool:
    """Whether a config class is that of an image-text model with two separate halves (CLIP, SigLIP)."""
    return {"vision_config", "text_config"} <= set(config.sub_configs)


def tower_config(raw: Mapping[str, Any], source: str) -> PretrainedConfig:
    """The vision config of a tower's config.json; `source` says in a message where that lies.

    Raises:
        UnknownNameError: no vision model that transformers knows.
        CannotBeTowerError: one that gives no row of patches, with the reason that a probe found.
    """
    model_type = str(raw.get("model_type"))
    if model_type not in CONFIG_MAPPING or holds_language_model(CONFIG_MAPPING[model_type]):
        raise UnknownNameError(
            f"{source} is a {model_type!r} model, not a known vision tower. Known: the vision models of transformers "
            "that give a row of patches, and the image-text models around them, such as clip, siglip, dinov2, "
            "dinov3_vit (docs/TOWERS.md)"
        )
    config = CONFIG_MAPPING[model_type].from_dict(dict(raw))
    config = config.vision_config if is_whole(type(config)) else config
    if type(config) in SAME_AS:
        fields = {name: value for name, value in config.to_dict().items() if name != "model_type"}
        config = SAME_AS[type(config)].from_dict(fields)
    config.architectures = None
    try:
        shape_of(config)
    except CannotBeTowerError as error:
        raise CannotBeTowerError(f"{source} ({config.model_type}) cannot be a tower: {error}.") from error
    return config


def tower_shape(config: PretrainedConfig) -> TowerShape:
    """What a tower, or several joined, give for one image."""
    return joined_shape(config) if isinstance(config, JoinedTowersConfig) else shape_of(config)


def composed_tower(
    configs: Sequence[PretrainedConfig], select_feature: str, projector: ProjectorSpec
) -> PretrainedConfig:
    """The vision config of a composed model: a tower's own where Hugging Face's class reads it as it is.

    Args:
        configs: of the towers, in their order.
        select_feature: see `SELECT_FEATURES`.
        projector: what reads the features.

    Raises:
        UserError: the towers give different numbers of patches.
    """
    first = shape_of(configs[0])
    leaves_out = first.extras > 1 and select_feature == "patch"
    cuts_row = first.in_one_row and projector.layers is None  # linear layers do not care which image a patch is of
    if len(configs) == 1 and not leaves_out and not cuts_row:
        return configs[0]
    vision = join(configs)
    logger.warning("Plain transformers will not open this model: %s.", vision.reason)
    return vision


def tower_tensors(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of a tower by their names in its class. Raises UserError where some are missing that its features
    need, or where the whole tower gives something else than its config said."""
    weight_files(folder)
    dtype = dtype_of_part(folder, dtype)
    model, info = open_tower(folder, config, dtype)
    try:
        needed = read_parameters(model)
        around = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if needed & set(info["missing_keys"]) and is_whole(type(around)):
            model, info = open_tower(None, config, dtype, half_of(folder, config, dtype))
    except CannotBeTowerError as error:
        raise CannotBeTowerError(f"{folder} ({config.model_type}) cannot be a tower: {error}.") from error
    wrong = sorted(needed & set(info["missing_keys"])) + sorted(str(key) for key in info["mismatched_keys"])
    if wrong:
        raise UserError(f"{folder} lacks weights of its tower: {', '.join(wrong[:5])}")
    unread = sorted(info["missing_keys"])
    if unread:
        logger.info("%s lacks %s, which no feature depends on.", folder, ", ".join(unread[:5]))
    return model.state_dict()


def open_tower(
    folder: Path | None, config: PretrainedConfig, dtype: torch.dtype, state: Mapping[str, torch.Tensor] | None = None
) -> tuple[Any, dict[str, Any]]:
    """A tower by its own class, which knows what its tensors are called on disk, and what did not fit.

    Args:
        folder: of its weights, or of those of the image-text model around it.
        state: its weights in place of a folder's.
    """
    model, info = MODEL_MAPPING[type(config)].from_pretrained(
        folder,
        config=config,
        state_dict=None if state is None else dict(state),
        dtype=dtype,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    return model.eval(), info


def half_of(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of the vision half of an image-text model, whose class names them otherwise than the half's own."""
    whole = AutoModel.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    halves = [one for one in whole.modules() if isinstance(one, PreTrainedModel) and type(one.config) is type(config)]
    return halves[0].state_dict() if halves else {}


def read_parameters(model: Any) -> set[str]:
    """Names of the parameters that a tower's hidden states depend on: heads and poolers are not among them.

    Raises:
        CannotBeTowerError: in all its layers it does not give what a single layer promised.
    """
    layers = model.config.num_hidden_layers
    states = states_of(model, random_images(model, side_of(model.config)))
    if len(states) != layers + 1:
        raise CannotBeTowerError(f"its config says {layers} layers, but it gives {len(states)} hidden states")
    if not all(state.isfinite().all() for state in states):
        raise CannotBeTowerError("its hidden states of a random image are not finite")
    torch.stack([state.float().square().mean() for state in states]).sum().backward()
    names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return names


def select_strategy(tower: PretrainedConfig, select_feature: str) -> str:
    """Hugging Face's `vision_feature_select_strategy` for LLaVA's `mm_vision_select_feature`.

    'patch' leaves the class token out where the tower has one; 'cls_patch' keeps it; 'full' keeps every token.

    Raises:
        UserError: an unknown one, or 'cls_patch' where no class token is known.
    """
    if select_feature not in SELECT_FEATURES:
        raise UserError(
            f"--mm_vision_select_feature {select_feature!r} is unknown. Known: {', '.join(SELECT_FEATURES)}"
        )
    known = known_features(tower)
    if select_feature not in known:
        raise UserError(f"--mm_vision_select_feature {select_feature}: {known_tokens(tower)} Use {' or '.join(known)}.")
    return "default" if select_feature == "patch" and tower_shape(tower).extras else "full"


def known_features(tower: PretrainedConfig) -> tuple[str, ...]:
    """The values of `SELECT_FEATURES` that a tower has."""
    if isinstance(tower, JoinedTowersConfig):
        return ("patch",)
    extras = shape_of(tower).extras
    return SELECT_FEATURES if extras == 1 else ("patch", "full")


def known_tokens(tower: PretrainedConfig) -> str:
    """Which tokens a tower gives, in a sentence."""
    if isinstance(tower, JoinedTowersConfig):
        return "of joined towers there are the patches alone."
    extras = shape_of(tower).extras
    if not extras:
        return f"a {tower.model_type} has no class token."
    return f"a {tower.model_type} has {extras} tokens before the patches, and none of them is known as the class token."


def selected_features(config: PretrainedConfig) -> tuple[str, ...]:
    """What `--mm_vision_select_feature` a composed model was put together with; several where they mean the same."""
    extras = tower_shape(config.vision_config).extras
    if config.vision_feature_select_strategy == "default":
        return ("patch",)
    return {0: ("patch", "full"), 1: ("cls_patch", "full")}.get(extras, ("full",))


def check_select_layer(tower: PretrainedConfig, layer: int) -> None:
    """Raises UserError unless the tower has hidden states of this index (0: embeddings; negative from the end)."""
    states = tower.num_hidden_layers + 1
    if not -states <= layer < states:
        raise UserError(
            f"--mm_vision_select_layer {layer}: the tower has {tower.num_hidden_layers} layers, "
            f"so choose from {-states} to {states - 1}."
        )
    if (
        isinstance(tower, JoinedTowersConfig)
        and layer >= 0
        and len({one.num_hidden_layers for one in tower.configs}) > 1
    ):
        depths = " and ".join(str(one.num_hidden_layers) for one in tower.configs)
        raise UserError(f"--mm_vision_select_layer {layer}: the towers have {depths} layers. Count from the end: -2.")


def tower_tokens(tower: PretrainedConfig, strategy: str) -> int:
    """Tokens that one image becomes.

    Args:
        tower: the vision config.
        strategy: Hugging Face's `vision_feature_select_strategy`; 'default' drops the first token.
    """
    found = tower_shape(tower)
    return found.patches + found.extras - (strategy == "default")


def counting(tower: PretrainedConfig, strategy: str, tokens: int) -> dict[str, Any]:
    """How Hugging Face's LLaVA processor gets at the tokens of an image: fields of it.

    Args:
        tower: the vision config.
        strategy: see `tower_tokens`.
        tokens: that the projector gives.
    """
    height, width = canvas_of(tower)
    patch_size = tower_shape(tower).patch_size
    # It counts the patches of `pixel_values`, adds a number (negative where there are fewer), and takes off one.
    counted = (height // patch_size) * (width // patch_size) - (strategy == "default")
    return {
        "patch_size": patch_size,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": tokens - counted,
    }


def complete_processor(processor: Any, config: PretrainedConfig) -> None:
    """Gives a LLaVA processor what older folders, with preprocessor_config.json alone, leave to the model's config."""
    vision: Any = getattr(config, "vision_config", None)
    counts = hasattr(processor, "num_additional_image_tokens") and getattr(processor, "patch_size", 0) is None
    if vision is None or not counts:
        return
    # VipLlava's config says nothing of it: it drops the class token.
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    try:
        counted = counting(vision, strategy, tower_tokens(vision, strategy))
    except CannotBeTowerError:  # of a released model, whose processor counts in its own way
        return
    for name, value in counted.items():
        setattr(processor, name, value)


def projector_sizes(tower: PretrainedConfig, width: int, strategy: str) -> Sizes:
    """What the projector stands between.

    Args:
        tower: the vision config.
        width: of the language model's embeddings.
        strategy: see `tower_tokens`.
    """
    return Sizes(tower.hidden_size, width, tower_tokens(tower, strategy))


def tower_prefix(tower: PretrainedConfig) -> str:
    """What the installed transformers puts before the names of a tower's tensors (releases differ)."""
    with torch.device("meta"):
        names = AutoModel.from_config(tower, trust_remote_code=False).state_dict()
    return "vision_model." if any(name.startswith("vision_model.") for name in names) else ""
