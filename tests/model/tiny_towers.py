# SPDX-License-Identifier: Apache-2.0
"""Every vision model of transformers as a tiny one: the few config fields that make it so, as data."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from moellava.model.towers import holds_language_model, is_tower, is_whole

SIDE, GRID = 28, 2
"""Height and width of a tiny tower's images in pixels, and of its grid in patches."""

COMMON: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "hidden_dim"), 16),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depth"), 3),
    **dict.fromkeys(("num_attention_heads", "num_heads"), 2),
    "intermediate_size": 24,
    "image_size": SIDE,
    "patch_size": SIDE // GRID,
    "num_register_tokens": 4,
}
"""Sizes by the names that configs have for them; a config takes those that it has."""

STAGES = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 4, "image_size": 32}
"""Layers that come in stages, with fewer tokens from stage to stage."""

GROWING = {"hidden_sizes": [8, 16], "depths": [1, 1], "image_size": 64, "patch_size": 4}

HEADS = {"num_attention_heads": [1, 2, 5, 8]}

OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("swin", "swinv2", "donut-swin", "maskformer-swin"), STAGES),
    **dict.fromkeys(("convnext", "convnextv2"), GROWING | {"num_stages": 2}),
    "dinov3_convnext": GROWING,
    **dict.fromkeys(("pvt", "pvt_v2", "segformer", "glpn"), HEADS | {"image_size": 64}),
    "cvt": {"embed_dim": [8, 16, 32], "num_heads": [1, 1, 2], "depth": [1, 1, 1]},
    "depth_pro": {"image_size": None, "patch_size": 384},
    "dinat": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "kernel_size": 3},
    "efficientloftr": {"hidden_size": 256},
    "efficientnet": {"image_size": 64, "hidden_dim": 2560},
    "focalnet": {"embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3]}
    | {"image_size": 32, "patch_size": 4},
    "granite_docling_vision": {"hidden_size": 128, "image_size": 128, "patch_size": 16},
    "hiera": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "num_query_pool": 1}
    | {"image_size": [32, 32], "patch_size": [7, 7]},
    "levit": {"hidden_sizes": [8, 16, 24], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1], "image_size": 64}
    | {"key_dim": [8, 8, 8], "patch_size": 16},
    "mgp-str": {"image_size": [32, 128], "patch_size": 4},
    "mobilevitv2": {"image_size": 64, "patch_size": 2},
    "sam3_vision_model": {
        "backbone_config": {"model_type": "sam3_vit_model", "hidden_size": 16, "image_size": SIDE}
        | {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": 14}
    },
    "swin2sr": STAGES | {"patch_size": 1, "window_size": 4, "embed_dim": 16},
    "vit_mae": {"image_size": 4 * SIDE},
    "yolos": {"image_size": [SIDE, SIDE], "num_detection_tokens": 5},
}
"""Fields of a config beside `COMMON`, by `model_type`."""


OWN_CLASSES = {"metaclip_2_vision_model": hf.MetaClip2VisionModel}
"""Classes that AutoModel does not know, of models that are towers all the same."""

AS_THEY_ARE = {"dots3_note_vision_encoder", "florence_vision", "molmo2_vision"}
"""Models that are refused before they are built, and whose configs take none of the common sizes."""


def vision_models() -> list[str]:
    """The `model_type` of every vision model of the installed transformers: those that AutoModel opens, and the vision
    parts of models for images and text."""
    names = {name for name in hf.CONFIG_MAPPING if is_tower(name) and not is_whole(hf.CONFIG_MAPPING[name])}
    for name in hf.CONFIG_MAPPING:
        part = hf.CONFIG_MAPPING[name].sub_configs.get("vision_config")
        if getattr(part, "model_type", None) in hf.CONFIG_MAPPING and not holds_language_model(part):
            names.add(part.model_type)
    return sorted(name for name in names if not name.startswith("moellava"))


def tiny_config(model_type: str, **fields: Any) -> hf.PretrainedConfig:
    """A config of a tiny vision model; `fields` are of it, beside those above."""
    config_class = hf.CONFIG_MAPPING[model_type]
    known = config_class().to_dict()
    sizes = {name: value for name, value in COMMON.items() if name in known and model_type not in AS_THEY_ARE}
    return config_class(**sizes | OVERRIDES.get(model_type, {}) | fields)


def tiny_vision_model(model_type: str, **fields: Any) -> torch.nn.Module:
    """A random one, every parameter moved, so that norms, biases and scales of layers are not all ones and zeros."""
    torch.manual_seed(2)
    config = tiny_config(model_type, **fields)
    model = OWN_CLASSES.get(model_type, hf.AutoModel.from_config)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
