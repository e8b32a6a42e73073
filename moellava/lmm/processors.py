# SPDX-License-Identifier: Apache-2.0
"""Processors from their folders, also where torchvision is not installed.

transformers has image processors for Pillow alone, but its video processors want torchvision, and a processor that has
one cannot even be built without. There it gets one of ours (`data/frame_processors.py`), which reads the same settings
and writes them back when the processor is saved.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils.import_utils import is_torchvision_available

from moellava.data.frame_processors import AREAS, UNKNOWN, FrameProcessor, FrameRecipe, with_frames
from moellava.errors import UserError
from moellava.files import read_json
from moellava.lmm.architecture import ARCHITECTURES, Architecture
from moellava.model.shaped import PixtralProcessor, processor_class

SETTINGS = ("processor_config.json", "preprocessor_config.json")
"""Files that describe a processor; folders of older versions have the second only."""

NEEDED = (SETTINGS, ("tokenizer.json", "tokenizer.model", "vocab.json"), ("tokenizer_config.json",))
"""Of each of these, a folder has at least one file: settings, vocabulary, and which of its tokens are special."""

VIDEO, VIDEO_SETTINGS = "video_processor", "video_preprocessor_config.json"

AUDIO = "feature_extractor"

WANTED = "torchvision"


def load_processor(folder: Path, architecture: Architecture, model_type: str) -> Any:
    """The processor of a folder.

    Args:
        folder: of the model.
        architecture: its own.
        model_type: of its config.json, by which transformers knows the class of the processor, where the folder itself
            does not say it: a LLaVA with Pixtral's tower has Pixtral's.

    Raises:
        UserError: transformers has no processor for it; a file of it is missing, or a package that it needs.
    """
    name = named_class(folder) or PROCESSOR_MAPPING_NAMES.get(model_type)
    if name is None:
        raise UserError(
            f"transformers {transformers.__version__} has no processor for {model_type!r} models, of which {folder} is "
            f"one: give the entry of {architecture.name} a `remote_processor` (docs/ADD_A_MODEL.md)."
        )
    for names in NEEDED:
        if not any((folder / name).is_file() for name in names):
            raise UserError(
                f"{folder} lacks {' and '.join(names)}: no processor can be built for {architecture.name}. Copy the "
                "file from where the model comes from."
            )
    cls = processor_class() if name == PixtralProcessor.__name__ else getattr(transformers, name)
    try:
        if VIDEO in inspect.signature(cls.__init__).parameters and not is_torchvision_available():
            return without_torchvision(cls, folder, architecture.video or recipe_of(folder))
        return cls.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ImportError, ValueError, AttributeError) as error:
        if not is_torchvision_available() and WANTED in str(error).lower():
            raise UserError(
                f"The processor of {folder}, a {name}, needs torchvision: pip install torchvision"
            ) from error
        raise UserError(f"The processor of {folder} cannot be built: {error}") from error


def named_class(folder: Path) -> str | None:
    """The processor class that a folder's settings name, if transformers has it."""
    said = (read_json(folder / file).get("processor_class") for file in (*SETTINGS, "tokenizer_config.json"))
    return next((name for name in said if name and hasattr(transformers, name)), None)


def without_torchvision(cls: Any, folder: Path, recipe: FrameRecipe) -> Any:
    """A processor of `cls` whose video processor is one of ours."""
    known = inspect.signature(cls.__init__).parameters
    raw = read_json(folder / SETTINGS[0])
    options = {name: value for name, value in raw.items() if name in known and not isinstance(value, dict)}
    parts = {"image_processor": AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)}
    if AUDIO in known:
        parts[AUDIO] = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=False)
    template = folder / "chat_template.jinja"
    if template.is_file():
        options["chat_template"] = template.read_text(encoding="utf-8")
    elif (folder / "chat_template.json").is_file():
        options["chat_template"] = read_json(folder / "chat_template.json")["chat_template"]
    return build_without_torchvision(
        cls,
        recipe,
        **parts,
        tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        video_settings=video_settings_of(folder, recipe),
        **options,
    )


def recipe_of(folder: Path) -> FrameRecipe:
    """What a folder's video processor does to frames, by the class that it names, where an entry knows it."""
    known = {entry.video.class_name: entry.video for entry in ARCHITECTURES.values() if entry.video}
    return known.get(own_video_settings(folder).get("video_processor_type", ""), UNKNOWN)


def own_video_settings(folder: Path) -> dict[str, Any]:
    """What a folder says of its video processor alone: a section, or a file of its own; {} where it has neither."""
    return read_json(folder / SETTINGS[0]).get(VIDEO) or read_json(folder / VIDEO_SETTINGS)


def video_settings_of(folder: Path, recipe: FrameRecipe) -> dict[str, Any]:
    """A video processor's settings, where transformers looks for them: a section or a file of their own, or else those
    that it shares with the image processor."""
    shared = read_json(folder / SETTINGS[1]).items()
    return own_video_settings(folder) or {name: value for name, value in shared if name in (*recipe.defaults, *AREAS)}


def build_without_torchvision(cls: Any, recipe: FrameRecipe, *, video_settings: dict[str, Any], **parts: Any) -> Any:
    """`cls` from its parts, with a video processor of ours by a recipe in these settings."""
    return with_frames(cls)(**parts, video_processor=FrameProcessor(recipe, video_settings))
