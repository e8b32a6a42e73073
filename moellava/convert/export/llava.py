# SPDX-License-Identifier: Apache-2.0
"""A composed model as the folder that LLaVA and MoE-LLaVA read (see published.py for the layout)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moellava.constants import TILED
from moellava.errors import UserError
from moellava.files import STAGING, staged
from moellava.model.build import ROPE_FIELDS
from moellava.model.families import Family, family_of
from moellava.model.projectors import parse_projector
from moellava.model.projectors.layers import to_published
from moellava.model.published import MERGED
from moellava.model.section import Section, section_of
from moellava.model.tiles import NEWLINE
from moellava.model.towers import tower_prefix
from moellava.moe import MoESpec, gather_moe_state_dict, moe_layers
from moellava.vlm import VLM

WEIGHTS = "pytorch_model.bin"

PUBLISHED_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""`model_type` of the towers that LLaVA's code opens."""

SPARSE_KEY = re.compile(r"model\.language_model\.(layers\.\d+\.mlp)\.(experts\.\d+|shared)\.(.+)")
ROUTING_KEY = re.compile(r"model\.language_model\.layers\.(\d+)\.mlp\.(router|coefficient)\.(.+)")

THEIR_MOE_FIELDS = (
    "moe_mode",
    "moe_layers_idx",
    "top_k_experts",
    "capacity_factor",
    "eval_capacity_factor",
    "min_capacity",
    "use_residual",
    "router_aux_loss_coef",
)


def write_published(vlm: VLM, folder: str | Path) -> None:
    """Writes `config.json`, `pytorch_model.bin` and the tokenizer, if there is one.

    Args:
        vlm: composed of a language model and a tower, dense or sparse.
        folder: is made where it is missing.

    Raises:
        UserError: the model has something that the layout cannot say; the message names it.
    """
    folder = Path(folder)
    if vlm.architecture is None and vlm.section.family is None:
        raise UserError(
            f"{vlm.source}: LLaVA's layout has no name for a {vlm.model.config.text_config.model_type} language model. "
            "The folder opens in plain transformers as it is, unless its README.md says otherwise."
        )
    if vlm.section.family is None:
        raise UserError(
            f"{vlm.source} is of a class of its own ({type(vlm.model).__name__}), which LLaVA's layout does not hold: "
            "that is for language models composed with a tower here or by LLaVA."
        )
    config = published_config(vlm.model)
    state = published_state(vlm.model, config)
    with staged(folder, STAGING) as staging:
        torch.save(state, staging / WEIGHTS)
        (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if vlm.tokenizer is not None:
            vlm.tokenizer.save_pretrained(staging)


def published_config(model: Any) -> dict[str, Any]:
    """The `config.json` that LLaVA's code writes for such a model. Raises UserError: see `write_published`."""
    family = family_of(model)
    section = section_of(model.config) or Section()
    if section.head_bias:
        raise UserError("This model's head has a bias, which folders of LLaVA and MoE-LLaVA lack.")
    tower = model.config.vision_config.model_type
    if tower not in PUBLISHED_TOWERS:
        raise UserError(f"LLaVA's code knows towers of CLIP and SigLIP, and this model's is {tower}.")
    layers = moe_layers(model)
    full = model.config.vision_feature_select_strategy == "full"
    fields = family.their_config(flat_rope(model.config.text_config.to_dict()))
    fields |= {
        "model_type": f"{'moe_' if layers else ''}llava_{family.published_types[0]}",
        "image_aspect_ratio": section.image_aspect_ratio,
        "image_projector_type": section.image_projector_type,
        "mm_hidden_size": model.config.vision_config.hidden_size,
        "mm_image_tower": section.image_tower,
        "mm_video_tower": None,
        "mm_use_im_start_end": section.use_im_start_end,
        "mm_vision_select_feature": "cls_patch" if full else "patch",
        "mm_vision_select_layer": model.config.vision_feature_layer,
        "tie_word_embeddings": model.config.tie_word_embeddings,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
    }
    if TILED.fullmatch(section.image_aspect_ratio):
        grids = [[wide, high] for high, wide in model.config.image_grid_pinpoints]
        fields |= {"image_grid_pinpoints": grids, "mm_patch_merge_type": MERGED}
    if layers:
        fields["moe"] = published_moe(
            [module.n_experts for _, module in layers], [i for i, _ in layers], layers[0][1].spec
        )
    return {name: value for name, value in fields.items() if not isinstance(value, torch.dtype)}


def flat_rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A text config's fields with `rope_parameters` under the names of transformers 4."""
    rope = dict(fields.get("rope_parameters") or {})
    flat = {name: rope.pop(name) for name in ROPE_FIELDS if name in rope}
    projector = rope.pop("rope_type", "default")
    flat["rope_scaling"] = None if projector == "default" else {"type": projector, **rope}
    return {**{name: value for name, value in fields.items() if name != "rope_parameters"}, **flat}


def published_moe(n_experts: list[int], layers: list[int], spec: MoESpec) -> dict[str, Any]:
    """The `moe` section. Raises UserError where the routing is none that MoE-LLaVA has."""
    lacking = []
    if spec.init == "shared":
        lacking.append("a shared expert")
    if spec.router_balance == "bias":
        lacking.append("a balancing bias in its routers")
    if spec.top_k_experts == 1 and spec.top1_gate == "exact":
        lacking.append("top-1 gates of value 1 (MoE-LLaVA scales by the probability: --top1_gate probability)")
    if spec.top_k_experts > 2:
        lacking.append(f"top-{spec.top_k_experts} routing")
    if lacking:
        raise UserError(f"MoE-LLaVA's layers cannot run this model: it has {', '.join(lacking)}.")
    fields = {name: getattr(spec, name) for name in THEIR_MOE_FIELDS}
    return fields | {
        "ep_size": 1,
        "moe_enable": True,
        "moe_layers_idx": layers,
        "num_experts": n_experts,
        "train_modules": None,
    }


def published_state(model: Any, raw: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A composed model's tensors under the names of LLaVA's code.

    Args:
        raw: the published config.
    """
    family = family_of(model)
    inner = family.layers.split(".")[0]
    prefix = tower_prefix(model.config.vision_config)
    projector = parse_projector(raw["image_projector_type"])
    result: dict[str, torch.Tensor] = {}
    language: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in gather_moe_state_dict(model).items():
        if key.startswith("model.vision_tower."):
            name = key.removeprefix("model.vision_tower.").removeprefix(prefix)
            result[f"{inner}.image_tower.image_tower.vision_model.{name}"] = tensor
        elif key == NEWLINE:
            result[f"{inner}.image_newline"] = tensor
        elif key.startswith("model.multi_modal_projector."):
            theirs = to_published(key.removeprefix("model.multi_modal_projector."), projector)
            if theirs is not None:
                result[f"{inner}.mm_projector.image_spatial_proj.{theirs}"] = tensor
        elif match := ROUTING_KEY.fullmatch(key):
            part = "deepspeed_moe.gate.wg" if match[2] == "router" else match[2]
            result[f"{family.layers}.{match[1]}.mlp.{part}.{match[3]}"] = tensor
        elif match := SPARSE_KEY.fullmatch(key):
            language.setdefault(match[2], {})[f"model.{match[1]}.{match[3]}"] = tensor
        else:
            language.setdefault("", {})[key.replace("model.language_model.", "model.", 1)] = tensor
    for part, tensors in language.items():
        result |= rename(part, tensors, family, raw)
    return {key: tensor.detach().clone() for key, tensor in result.items()}


def rename(
    part: str, tensors: Mapping[str, torch.Tensor], family: Family, raw: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """One part of the language model: all that is dense (''), the experts of one index, or the MLPs beside them."""
    inside = {"": "", "shared": "mlp."}.get(
        part, f"deepspeed_moe.experts.deepspeed_experts.{part.removeprefix('experts.')}."
    )
    theirs = family.to_theirs(tensors, raw)
    return {key.replace(".mlp.", f".mlp.{inside}"): tensor for key, tensor in theirs.items()}
