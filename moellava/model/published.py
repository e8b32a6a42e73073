"""Folders that LLaVA and MoE-LLaVA wrote, in and out, without their code.

Such a folder is the language model's own checkpoint with three things added, all under its inner module's name
(`model.`, or `transformer.` for Qwen-1):

    image_tower.image_tower.…  or  vision_tower.vision_tower.…       the tower
    mm_projector.image_spatial_proj.{0,2}.…  or  mm_projector.{0,2}.… the projector
    layers.I.mlp.deepspeed_moe.experts.deepspeed_experts.E.…         expert E of a sparse layer, named as the MLP is
    layers.I.mlp.deepspeed_moe.gate.wg.weight                        its router
    layers.I.mlp.mlp.…  and  layers.I.mlp.coefficient.…              residual MoE: the MLP beside the experts, the mixer
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaProcessor, PretrainedConfig, PreTrainedTokenizerFast

from moellava.data.tokenizers import TOKENIZER_FILES, load_tokenizer, place_image_token
from moellava.errors import UserError
from moellava.files import read_config, resolve_folder
from moellava.log import get_logger
from moellava.model import projector as projectors
from moellava.model.compose import (
    OLD_BUFFERS,
    composed_name,
    generation_config,
    grow_embeddings,
    image_tokens,
    language_model_tensors,
    llava_config,
    make_processor,
    section,
)
from moellava.model.families import Family, base_family, published_family
from moellava.model.loading import build, text_config
from moellava.model.towers import (
    ASPECT_RATIOS,
    load_tower,
    tower_config,
    tower_image_processor,
    tower_prefix,
)
from moellava.model.weights import has_weights, read_file, read_tensors

TOWER_KEY = re.compile(r"(?:model|transformer)\.(?:image_tower\.image_tower|vision_tower\.vision_tower)\.(.+)")
PROJECTOR_KEY = re.compile(r"(?:.*\.)?mm_projector\.(?:image_spatial_proj\.)?((?:\d+\.)?(?:weight|bias))")
OUR_PROJECTOR_KEY = re.compile(r"(?:model\.)?multi_modal_projector\.(.+)")
EXPERT_KEY = re.compile(r"(.+\.mlp)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(.+)")
ROUTER_KEY = re.compile(r".+\.(\d+)\.mlp\.deepspeed_moe\.gate\.wg\.(.+)")
RESIDUAL_KEY = re.compile(r"(.+\.mlp)\.mlp\.(.+)")
COEFFICIENT_KEY = re.compile(r".+\.(\d+)\.mlp\.coefficient\.(.+)")

STAGE_1_FILE = "mm_projector.bin"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight")

logger = get_logger(__name__)


def open_published(
    folder: Path, model_base: str | Path | None, dtype: torch.dtype
) -> tuple[Any, PreTrainedTokenizerFast | None, LlavaProcessor | None]:
    """A published folder -> model, tokenizer, processor; the latter two are None where there is no tokenizer.

    Args:
        folder: holds config.json, and either all weights or, after stage 1, `mm_projector.bin`.
        model_base: the language model, needed after stage 1, and where the folder has no tokenizer.
        dtype: of all weights.

    Raises:
        UserError: files are missing, or the folder uses something that a composed model has not.
    """
    model = read_published(folder, dtype, model_base)
    extras = model.config.moellava
    rows = model.get_input_embeddings().weight.shape[0]
    source = folder if model_base is None else resolve_folder(str(model_base), "--model-base")
    if not any(path for pattern in TOKENIZER_FILES for path in source.glob(pattern)):
        logger.warning("%s holds no tokenizer: the model comes without one. Give the base as --model-base.", source)
        grow_embeddings(model, rows + 1)
        model.config.image_token_index = rows
        return model, None, None
    tokenizer = load_tokenizer(str(source), extras["version"])
    token_ids = place_image_token(tokenizer, max(rows, len(tokenizer)), image_tokens(extras["use_im_start_end"]))
    grow_embeddings(model, max(token_ids) + 1)
    model.config.image_token_index, extras["image_token_ids"] = token_ids[0], token_ids
    model.generation_config = generation_config(tokenizer)
    tower = resolve_folder(extras["image_tower"], "the config's image tower", near=folder)
    image_processor = tower_image_processor(tower, model.config.vision_config)
    return model, tokenizer, make_processor(image_processor, tokenizer, model.config)


def read_published(folder: Path, dtype: torch.dtype, model_base: str | Path | None = None) -> Any:
    """The model of a published folder; its image token is not placed yet (`image_token_index` is the last row).

    Raises:
        UserError: see `open_published`.
    """
    raw = read_config(folder, "--model-path")
    family = published_family(raw)
    config = composed_config(raw, family, folder)
    state = published_tensors(folder, family, raw, config, model_base)
    if not any(name.startswith("model.vision_tower.") for name in state):
        tower = load_tower(str(resolve_folder(tower_name(raw), "the config's image tower", near=folder)), dtype)
        state |= {f"model.vision_tower.{name}": tensor for name, tensor in tower.model.state_dict().items()}
    config.moellava["head_bias"] = "lm_head.bias" in state  # that of a base, after stage 1
    kind = projectors.parse_projector(config.moellava["image_projector_type"])
    for name, tensor in projectors.identities(kind, config.text_config.hidden_size).items():
        state[f"model.multi_modal_projector.{name}"] = tensor
    return build(config, state, dtype, str(folder))


def published_tensors(
    folder: Path, family: Family, raw: Mapping[str, Any], config: PretrainedConfig, model_base: str | Path | None
) -> dict[str, torch.Tensor]:
    """A published folder's tensors under the composed model's names."""
    if not has_weights(folder) and (folder / STAGE_1_FILE).is_file():
        return stage_1_tensors(folder, model_base)
    prefix = tower_prefix(config.vision_config)
    state: dict[str, torch.Tensor] = {}
    for key, tensor in read_tensors(folder).items():
        if not key.endswith(OLD_BUFFERS):
            state |= from_published(key, tensor, family, raw, prefix)
    return state


def stage_1_tensors(folder: Path, model_base: str | Path | None) -> dict[str, torch.Tensor]:
    """The language model's tensors and the projector that stage 1 left. Raises UserError without a language model."""
    if model_base is None:
        raise UserError(
            f"--model-path {folder} holds a stage-1 projector alone ({STAGE_1_FILE}). "
            "Give the language model that it was trained on as --model-base."
        )
    base = resolve_folder(str(model_base), "--model-base")
    raw = read_config(base, "--model-base")
    found = dict(read_file(folder / STAGE_1_FILE))
    if any(key.endswith(EMBEDDINGS) for key in found):
        raise UserError(
            f"{folder / STAGE_1_FILE} also holds embeddings of <im_start> and <im_end>. Train on from it with "
            "--pretrain_mm_mlp_adapter and --mm_use_im_start_end True."
        )
    projector = projector_tensors(found)
    return language_model_tensors(base, base_family(raw), raw) | {
        f"model.multi_modal_projector.{key}": tensor for key, tensor in projector.items()
    }


def from_published(
    key: str, tensor: torch.Tensor, family: Family, raw: Mapping[str, Any], prefix: str
) -> dict[str, torch.Tensor]:
    """One tensor of a published checkpoint -> the composed model's names and numbers.

    Args:
        raw: the published config.
        prefix: what the installed transformers puts before the names of this tower's tensors.
    """
    if match := TOWER_KEY.fullmatch(key):
        return {f"model.vision_tower.{prefix}{match[1].removeprefix('vision_model.')}": tensor}
    if match := PROJECTOR_KEY.fullmatch(key):
        return {f"model.multi_modal_projector.{projectors.from_published(match[1])}": tensor}
    if match := ROUTER_KEY.fullmatch(key):
        return {f"model.language_model.layers.{match[1]}.mlp.router.{match[2]}": tensor}
    if match := COEFFICIENT_KEY.fullmatch(key):
        return {f"model.language_model.layers.{match[1]}.mlp.coefficient.{match[2]}": tensor}
    inside = ""
    if match := EXPERT_KEY.fullmatch(key):
        key, inside = f"{match[1]}.{match[3]}", f"experts.{match[2]}."
    elif match := RESIDUAL_KEY.fullmatch(key):
        key, inside = f"{match[1]}.{match[2]}", "shared."
    ours = family.to_ours(key, tensor, raw)
    return {composed_name(name).replace(".mlp.", f".mlp.{inside}"): value for name, value in ours.items()}


def projector_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The projector among the tensors of any folder or `mm_projector.bin`, as `linear_1.weight` …"""
    found = {}
    for key, tensor in tensors.items():
        if match := PROJECTOR_KEY.fullmatch(key):
            found[projectors.from_published(match[1])] = tensor
        elif match := OUR_PROJECTOR_KEY.fullmatch(key):
            found[match[1]] = tensor
    return found


def tower_name(raw: Mapping[str, Any]) -> str:
    """The tower that a published config names. Raises UserError where it names a video tower as well, or none."""
    if raw.get("mm_video_tower"):
        raise UserError(f"This checkpoint has a video tower ({raw['mm_video_tower']}), which a composed model lacks.")
    name = raw.get("mm_image_tower") or raw.get("mm_vision_tower")
    if not name:
        raise UserError("This checkpoint's config names no image tower.")
    return name


def is_sparse(raw: Mapping[str, Any]) -> bool:
    """Whether a config, ours or a published one, is that of a sparse model."""
    return bool(raw.get("moe")) and raw["moe"].get("moe_enable", True)


def composed_config(raw: Mapping[str, Any], family: Family, folder: Path) -> LlavaConfig:
    """A published config as that of a composed model."""
    aspect_ratio = raw.get("image_aspect_ratio") or "square"
    if aspect_ratio not in ASPECT_RATIOS:
        raise UserError(
            f"{folder} cuts images into tiles (image_aspect_ratio {aspect_ratio!r}): that is LLaVA-1.6. "
            "Open its Hugging Face conversion (llava-hf/…) by its model id instead."
        )
    tower = tower_name(raw)
    vision = tower_config(resolve_folder(tower, "the config's image tower", near=folder), "the config's image tower")
    projector = raw.get("image_projector_type") or raw.get("mm_projector_type") or "linear"
    # The reference drops the first token for 'patch' whatever the tower: of a SigLIP, which has no class token, a
    # patch is lost.
    strategy = "full" if raw.get("mm_vision_select_feature") == "cls_patch" else "default"
    text = text_config(family, (family.published_text_config or family.text_config)(raw))
    kind, layer = projectors.parse_projector(projector), raw.get("mm_vision_select_layer", -2)
    config = llava_config(vision, text, kind, strategy, layer, text.vocab_size - 1)
    config.moellava = section(
        family,
        image_aspect_ratio=aspect_ratio,
        image_projector_type=projector,
        image_tower=tower,
        use_im_start_end=bool(raw.get("mm_use_im_start_end")),
    )
    if is_sparse(raw):
        config.moe = dict(raw["moe"])
    return config
