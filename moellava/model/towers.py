"""Vision towers by config: CLIP and SigLIP, from a tower's own folder or from the vision half of a full model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    BaseImageProcessor,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    LlavaImageProcessorPil,
    PretrainedConfig,
    PreTrainedModel,
    SiglipImageProcessorPil,
    SiglipVisionModel,
)

from moellava.errors import UnknownNameError, UserError
from moellava.model.projectors import Sizes
from moellava.model.weights import weight_files
from moellava.registry import Registry


@dataclass(frozen=True)
class TowerSpec:
    """What a tower is, by its `model_type`.

    Args:
        full_model_type: `model_type` of the image-text model whose vision half it is.
        model: the class that reads the tower from either.
        class_tokens: tokens before the patches (CLIP has one, SigLIP none).
        image_processor: makes `pixel_values` of an image (the PIL version: it needs no torchvision).
    """

    full_model_type: str
    model: type[PreTrainedModel]
    class_tokens: int
    image_processor: type[BaseImageProcessor]


TOWERS: Registry[TowerSpec] = Registry("vision tower")
TOWERS.register("clip_vision_model", TowerSpec("clip", CLIPVisionModel, 1, CLIPImageProcessorPil))
TOWERS.register("siglip_vision_model", TowerSpec("siglip", SiglipVisionModel, 0, SiglipImageProcessorPil))

SELECT_FEATURES = ("patch", "cls_patch")
ASPECT_RATIOS = ("square", "pad")


def tower_config(raw: Mapping[str, Any], source: str) -> PretrainedConfig:
    """The vision config of a tower's config.json; `source` says in a message where that lies.

    Raises:
        UnknownNameError: neither a known tower nor a known image-text model; the known ones are listed.
    """
    model_type = raw.get("model_type")
    for name, spec in TOWERS.items():
        if model_type == name:
            return AutoConfig.for_model(**raw)
        if model_type == spec.full_model_type:
            return AutoConfig.for_model(**{**raw.get("vision_config", {}), "model_type": name})
    known = ", ".join(f"{name} (or the {spec.full_model_type} around it)" for name, spec in TOWERS.items())
    raise UnknownNameError(f"{source} is a {model_type!r} model, not a known vision tower. Known: {known}")


def tower_image_processor(folder: Path, config: PretrainedConfig) -> BaseImageProcessor:
    """The image processor that lies beside a tower, or the default of its class at the tower's resolution."""
    spec = TOWERS[config.model_type]
    if (folder / "preprocessor_config.json").is_file():
        return spec.image_processor.from_pretrained(folder, trust_remote_code=False)
    side = {"height": config.image_size, "width": config.image_size}
    if spec.image_processor is CLIPImageProcessorPil:
        return CLIPImageProcessorPil(size={"shortest_edge": config.image_size}, crop_size=side)
    return spec.image_processor(size=side)


def tower_tensors(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of a tower by their names in its class. Raises UserError where some are missing."""
    weight_files(folder)
    model, info = TOWERS[config.model_type].model.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    wrong = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if wrong:
        raise UserError(f"{folder} lacks weights of its tower: {', '.join(wrong[:5])}")
    return model.state_dict()


def select_strategy(tower: PretrainedConfig, select_feature: str) -> str:
    """Hugging Face's `vision_feature_select_strategy` for LLaVA's `mm_vision_select_feature`.

    'patch' leaves the class token out where the tower has one; 'cls_patch' keeps every token.

    Raises:
        UserError: neither 'patch' nor 'cls_patch', or 'cls_patch' for a tower that has no class token.
    """
    if select_feature not in SELECT_FEATURES:
        raise UserError(
            f"--mm_vision_select_feature {select_feature!r} is unknown. Known: {', '.join(SELECT_FEATURES)}"
        )
    class_tokens = TOWERS[tower.model_type].class_tokens
    if select_feature == "cls_patch" and not class_tokens:
        raise UserError(
            f"--mm_vision_select_feature cls_patch: a {tower.model_type} has no class token. "
            "Use 'patch', which is all its tokens."
        )
    return "default" if select_feature == "patch" and class_tokens else "full"


def check_select_layer(tower: PretrainedConfig, layer: int) -> None:
    """Raises UserError unless the tower has hidden states of this index (0: embeddings; negative from the end)."""
    states = tower.num_hidden_layers + 1
    if not -states <= layer < states:
        raise UserError(
            f"--mm_vision_select_layer {layer}: the tower has {tower.num_hidden_layers} layers, "
            f"so choose from {-states} to {states - 1}."
        )


def tower_tokens(tower: PretrainedConfig, strategy: str) -> int:
    """Tokens that one image becomes.

    Args:
        tower: the vision config.
        strategy: Hugging Face's `vision_feature_select_strategy`; 'default' drops the first token.
    """
    patches = (tower.image_size // tower.patch_size) ** 2
    return patches + TOWERS[tower.model_type].class_tokens - (strategy == "default")


def complete_processor(processor: Any, config: PretrainedConfig) -> None:
    """Gives a LLaVA processor what older folders, with preprocessor_config.json alone, leave to the model's config."""
    vision: Any = getattr(config, "vision_config", None)
    if getattr(processor, "patch_size", 0) is None and getattr(vision, "model_type", None) in TOWERS:
        processor.patch_size = vision.patch_size
        # VipLlava's config says nothing of it: it drops the class token.
        processor.vision_feature_select_strategy = getattr(config, "vision_feature_select_strategy", "default")
        processor.num_additional_image_tokens = TOWERS[vision.model_type].class_tokens


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


def composed_image_processor(processor: BaseImageProcessor, aspect_ratio: str, tower: PretrainedConfig) -> Any:
    """The image processor of a composed model.

    Args:
        processor: the tower's own, or one that this function made.
        aspect_ratio: 'square' is the tower's own (CLIP's crops the centre); 'pad' first pads the image to a square in
            the mean colour, which Hugging Face's LLaVA processor does without our code.
        tower: the vision config.

    Raises:
        UserError: any other `aspect_ratio`.
    """
    if aspect_ratio not in ASPECT_RATIOS:
        raise UserError(f"--image_aspect_ratio {aspect_ratio!r} is unknown. Known: {', '.join(ASPECT_RATIOS)}")
    is_padding = isinstance(processor, LlavaImageProcessorPil)
    if is_padding == (aspect_ratio == "pad"):
        return processor
    settings = {key: value for key, value in processor.to_dict().items() if key not in _NOT_SETTINGS}
    if aspect_ratio == "square":
        return TOWERS[tower.model_type].image_processor(**settings)
    # A tower that takes the whole image (SigLIP) has no setting for the crop, where LLaVA's processor has a default.
    settings["do_center_crop"] = bool(settings.get("do_center_crop"))
    return LlavaImageProcessorPil(**settings, do_pad=True)


_NOT_SETTINGS = ("image_processor_type", "processor_class", "do_pad")
