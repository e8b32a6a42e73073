# SPDX-License-Identifier: Apache-2.0
"""Registering released models, by the names that docs/ADD_A_MODEL.md uses.

    MULTIMODAL_KEYWORDS["my-family"] = ["vision_tower", "multi_modal_projector"]
    register_model(model_id="mine", model_family_id="my-family", model_hf_path="somebody/mine")

Below are all that are registered: each file of `architectures/` is one entry.
"""

from __future__ import annotations

from moellava.lmm.architecture import (
    ARCHITECTURES,
    SUPPORTED_MODELS,
    Architecture,
    FieldView,
    SupportedModel,
    register_architecture,
    register_model,
)

__all__ = [
    "LMM_FAMILIES",
    "MULTIMODAL_KEYWORDS",
    "SUPPORTED_MODELS",
    "Architecture",
    "SupportedModel",
    "register_family",
    "register_model",
]

LMM_FAMILIES = ARCHITECTURES
register_family = register_architecture

MULTIMODAL_KEYWORDS = FieldView("keywords", begins=True)
"""Architecture -> where its parts are. Writing a name that is new registers an architecture: its models are of whatever
class of transformers their config.json says, and a plain list names what belongs to the vision part."""
