# SPDX-License-Identifier: Apache-2.0
"""Our classes among transformers' Auto classes, so that its own tools open sparse folders.

    import moellava
    pipeline("image-text-to-text", model="stage3")

A tool of somebody else's, which imports no moellava, is run with them:

    python -m moellava.auto_classes lmms_eval --model huggingface --model_args pretrained=stage3 …

transformers asks its table for the class of a folder's `model_type`, and that class for a config. What is put in
the table here takes milliseconds and no torch; it makes the real classes, and tells the Auto classes of them, when a
folder asks for them.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from typing import Any, ClassVar

from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

PREFIX = "moellava_"
"""What stands before the `model_type` of a class of transformers that is extended here, and of its text config."""

AUTO = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
"""Auto classes that open a whole model."""


class ConfigOnDemand:
    """Stands for the config class of extended models of one type until a folder asks for it."""

    model_type: str
    sub_configs: ClassVar = {"text_config": None, "vision_config": None}
    """What tells models of images and text from others, before anything is made."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of a folder; see `transformers.PreTrainedConfig.from_dict`."""
        return register_type(cls.model_type).from_dict(config_dict, **kwargs)


def register_auto_classes() -> None:
    """Has `AutoConfig` and the Auto classes of models know every type of extended model.

    Types of language models stay unknown: at those, transformers' own class of the whole stops (see `extended.py`).
    """
    for plain in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        name = PREFIX + plain
        AutoConfig.register(name, type("ConfigOnDemand", (ConfigOnDemand,), {"model_type": name}), exist_ok=True)


def register_type(model_type: str) -> Any:
    """The config class of extended models of a type, which the Auto classes know from here on with its model class."""
    transformers, extended = importlib.import_module("transformers"), importlib.import_module("moellava.model.extended")
    made = extended.extended_class(extended.base_of(model_type))
    for name in AUTO:
        getattr(transformers, name).register(made.config_class, made, exist_ok=True)
    return made.config_class


if __name__ == "__main__":
    register_auto_classes()
    sys.argv.pop(0)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
