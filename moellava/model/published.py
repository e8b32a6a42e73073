# SPDX-License-Identifier: Apache-2.0
"""Folders that LLaVA and MoE-LLaVA wrote, in and out, without their code.

Such a folder is the language model's own checkpoint with a few things added, all under its inner module's name
(`model.`, or `transformer.` for Qwen-1):

    image_tower.image_tower.…  or  vision_tower.vision_tower.…       the tower
    mm_projector.image_spatial_proj.{0,2}.…  or  mm_projector.{0,2}.… the projector
    image_newline                                                    what ends a row of patches (LLaVA-1.6)
    layers.I.mlp.deepspeed_moe.experts.deepspeed_experts.E.…         expert E of a sparse layer, named as the MLP is
    layers.I.mlp.deepspeed_moe.gate.wg.weight                        its router
    layers.I.mlp.mlp.…  and  layers.I.mlp.coefficient.…              residual MoE: the MLP beside the experts, the mixer
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from moellava.constants import TILED
from moellava.data.tokenizers import TOKENIZER_FILES, load_tokenizer
from moellava.errors import UserError
from moellava.log import get_logger
from moellava.model.build import text_config
from moellava.model.compose import (
    OLD_BUFFERS,
    composed_name,
    describe_new,
    language_model_tensors,
    llava_config,
    under,
)
from moellava.model.description import Description
from moellava.model.families import Family, base_family, published_family
from moellava.model.manifest import Manifest
from moellava.model.projectors import layers, parse_projector
from moellava.model.published_lora import is_lora, lora_tensors
from moellava.model.section import Section, section_of
from moellava.model.tiles import NEWLINE, WAYS, tiled_config
from moellava.model.towers import tower_config, tower_prefix, tower_shape, tower_tensors
from moellava.model.weights import has_weights, read_file, read_tensors

TOWER_KEY = re.compile(r"(?:model|transformer)\.(?:image_tower\.image_tower|vision_tower\.vision_tower)\.(.+)")
PROJECTOR_KEY = re.compile(r"(?:.*\.)?mm_projector\.(?:image_spatial_proj\.)?(.+)")
OUR_PROJECTOR_KEY = re.compile(r"(?:model\.)?multi_modal_projector\.(.+)")
NEWLINE_KEY = re.compile(r"(?:model|transformer)\.image_newline")
EXPERT_KEY = re.compile(r"(.+\.mlp)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(.+)")
ROUTER_KEY = re.compile(r".+\.(\d+)\.mlp\.deepspeed_moe\.gate\.wg\.(.+)")
RESIDUAL_KEY = re.compile(r"(.+\.mlp)\.mlp\.(.+)")
COEFFICIENT_KEY = re.compile(r".+\.(\d+)\.mlp\.coefficient\.(.+)")

STAGE_1_FILE = "mm_projector.bin"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight")

logger = get_logger(__name__)


def describe_published(manifest: Manifest) -> Description:
    """A folder that LLaVA or MoE-LLaVA wrote.

    Args:
        manifest: holds config.json, and either all weights or, after stage 1, `mm_projector.bin`; its `base` is the
            language model, needed after stage 1, and where the folder has no tokenizer.

    Raises:
        UserError: the folder uses something that a composed model has not.
    """
    family = published_family(manifest.config)
    tower = manifest.tower
    assert tower is not None  # read_folder has read it
    config = composed_config(manifest, tower, family)
    tokenizer = tokenizer_beside(manifest, family.version)
    rows = max(config.text_config.vocab_size, 0 if tokenizer is None else len(tokenizer))
    return describe_new(
        manifest,
        [tower],
        config,
        tokenizer,
        rows,
        lambda dtype: published_tensors(manifest, tower, family, config, dtype),
    )


def tokenizer_beside(manifest: Manifest, version: str) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a published folder, or of its base; None, said in the log, where there is none."""
    source = manifest.folder if manifest.base is None else manifest.base.folder
    if not any(path for pattern in TOKENIZER_FILES for path in source.glob(pattern)):
        logger.warning("%s holds no tokenizer: the model comes without one. Give the base as --model-base.", source)
        return None
    return load_tokenizer(source, version)


def published_tensors(
    manifest: Manifest, tower: Manifest, family: Family, config: PretrainedConfig, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """A published folder's tensors under the composed model's names, the tower's from its own folder if need be."""
    state: dict[str, torch.Tensor] = {}
    if not has_weights(manifest.folder) and (manifest.folder / STAGE_1_FILE).is_file():
        state = stage_1_tensors(manifest)
    else:
        prefix = tower_prefix(config.vision_config)
        for key, tensor in whole_tensors(manifest).items():
            if not key.endswith(OLD_BUFFERS):
                state |= from_published(key, tensor, family, manifest.config, prefix)
    if not any(name.startswith("model.vision_tower.") for name in state):
        state |= under("model.vision_tower", tower_tensors(tower.folder, config.vision_config, dtype))
    projector = parse_projector(str((section_of(config) or Section()).image_projector_type))
    identities = layers.identities(projector, config.text_config.hidden_size)
    return state | under("model.multi_modal_projector", identities)


def whole_tensors(manifest: Manifest) -> dict[str, torch.Tensor]:
    """All tensors of a published folder under its own names; of a LoRA folder, merged into its base's. Raises UserError
    for such a one without a base."""
    if has_weights(manifest.folder) or not is_lora(manifest.folder):
        return read_tensors(manifest.folder)
    if manifest.base is None or not manifest.base.config:
        raise UserError(
            f"{manifest.called} holds a LoRA adapter alone. Give the language model that it was trained on as "
            "--model-base."
        )
    return lora_tensors(manifest, read_tensors(manifest.base.folder))


def stage_1_tensors(manifest: Manifest) -> dict[str, torch.Tensor]:
    """The language model's tensors and the projector that stage 1 left. Raises UserError without a language model."""
    path = manifest.folder / STAGE_1_FILE
    if manifest.base is None or not manifest.base.config:
        raise UserError(
            f"{manifest.called} holds a stage-1 projector alone ({STAGE_1_FILE}). "
            "Give the language model that it was trained on as --model-base."
        )
    found = dict(read_file(path))
    if any(key.endswith(EMBEDDINGS) for key in found):
        raise UserError(
            f"{path} also holds embeddings of <im_start> and <im_end>. Train on from it with "
            "--pretrain_mm_mlp_adapter and --mm_use_im_start_end True."
        )
    tensors = language_model_tensors(manifest.base, base_family(manifest.base.config))
    return tensors | under("model.multi_modal_projector", projector_tensors(found))


def from_published(
    key: str, tensor: torch.Tensor, family: Family, raw: Mapping[str, Any], prefix: str
) -> dict[str, torch.Tensor]:
    """One tensor of a published checkpoint -> the composed model's names and numbers.

    Args:
        raw: the published config.
        prefix: what the installed transformers puts before the names of this tower's tensors.
    """
    if NEWLINE_KEY.fullmatch(key):
        return {NEWLINE: tensor}
    if match := TOWER_KEY.fullmatch(key):
        return {f"model.vision_tower.{prefix}{match[1].removeprefix('vision_model.')}": tensor}
    if match := PROJECTOR_KEY.fullmatch(key):
        return {f"model.multi_modal_projector.{layers.from_published(match[1])}": tensor}
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
            found[layers.from_published(match[1])] = tensor
        elif match := OUR_PROJECTOR_KEY.fullmatch(key):
            found[match[1]] = tensor
    return found


MERGED = "spatial_unpad"
"""How LLaVA-1.6 and LLaVA-OneVision put the features of tiles together, which is all that Hugging Face's classes do."""


def published_grids(manifest: Manifest) -> Any:
    """The grids of a published config, as it has them. Raises UserError where tiles are put together in another way."""
    merged = manifest.config.get("mm_patch_merge_type") or "flat"
    if merged != MERGED:
        raise UserError(
            f"{manifest.folder} puts the features of tiles together as {merged!r} (mm_patch_merge_type), which is not "
            f"known here. Known: {MERGED}."
        )
    return manifest.config.get("image_grid_pinpoints") or ""


def composed_config(manifest: Manifest, tower: Manifest, family: Family) -> Any:
    """A published config as that of a composed model. Raises UserError where that has no such thing."""
    raw = manifest.config
    aspect_ratio = raw.get("image_aspect_ratio") or "square"
    in_tiles = TILED.fullmatch(aspect_ratio)
    if aspect_ratio not in WAYS and not in_tiles:
        raise UserError(
            f"{manifest.folder} shows images in a way that is not known here (image_aspect_ratio {aspect_ratio!r}). "
            f"Known: {', '.join(WAYS)}."
        )
    vision = tower_config(tower.config, tower.called)
    name = raw.get("image_projector_type") or raw.get("mm_projector_type") or "linear"
    # The reference drops the first token for 'patch' whatever the tower: of a SigLIP, which has no class token, a
    # patch is lost. LLaVA-NeXT's code, which has tiles, takes all tokens of a SigLIP.
    keeps_all = raw.get("mm_vision_select_feature") == "cls_patch" or (in_tiles and not tower_shape(vision).extras)
    strategy = "full" if keeps_all else "default"
    text = text_config(family, (family.published_text_config or family.text_config)(raw))
    projector, layer = parse_projector(name), raw.get("mm_vision_select_layer", -2)
    config: Any = llava_config(vision, text, projector, strategy, layer)
    if in_tiles:
        config = tiled_config(config, projector, aspect_ratio, published_grids(manifest))
    Section(
        version=family.version,
        family=family.name,
        image_aspect_ratio=aspect_ratio,
        image_projector_type=name,
        image_tower=tower.name,
        use_im_start_end=bool(raw.get("mm_use_im_start_end")),
    ).put(config)
    if manifest.is_sparse:
        config.moe = dict(raw["moe"])
    return config
