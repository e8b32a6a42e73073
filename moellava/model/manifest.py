# SPDX-License-Identifier: Apache-2.0
"""What a model folder holds, read once. Nothing below reads its config.json again or resolves its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moellava.errors import UserError
from moellava.files import CONFIG, MODEL_FILES, read_config, resolve_folder
from moellava.model.extended import REMOTE
from moellava.model.integrity import check_digests, check_files
from moellava.model.section import Section, section_of
from moellava.model.towers import is_tower

LANGUAGE_MODEL, TOWER, VLM = "a language model", "a vision tower", "a vision-language model"
"""What a folder may hold."""

VISION_FIELDS = ("text_config", "vision_config", "visual", "img_processor")
"""Fields of a config.json that no language model has."""

OBJECTS = ("text_config", "vision_config", "moe", "moellava", "quantization_config", "auto_map")
"""Fields of a config.json that hold a JSON object, or null."""

TEXTS = ("model_type", "mm_image_tower", "mm_vision_tower")
"""Fields that hold a text, or null."""


@dataclass(frozen=True)
class Manifest:
    """A model folder.

    Args:
        folder: where it lies.
        name: what the user called it.
        flag: the flag that named it, for messages.
        config: its config.json.
        base: the language model of a published folder that holds a projector alone, or whose tokenizer lies elsewhere;
            its config is empty where it is that tokenizer alone.
        tower: the vision tower that a published folder names.
    """

    folder: Path
    name: str
    flag: str
    config: dict[str, Any]
    base: Manifest | None = None
    tower: Manifest | None = None

    @cached_property
    def section(self) -> Section | None:
        """What it says of itself, if a stage of ours or `moellava upcycle` has left it."""
        return section_of(self.config)

    @property
    def called(self) -> str:
        """How a message names it: by its flag and what the user gave."""
        return f"{self.flag} {self.name}"

    @cached_property
    def holds(self) -> str:
        """`LANGUAGE_MODEL`, `TOWER` or `VLM`, by its config."""
        if self.section is None and not self.is_published and is_tower(str(self.config.get("model_type", ""))):
            return TOWER
        is_vlm = self.section is not None or self.is_published or any(name in self.config for name in VISION_FIELDS)
        return VLM if is_vlm else LANGUAGE_MODEL

    @property
    def is_published(self) -> bool:
        """Whether LLaVA's or MoE-LLaVA's code wrote it: a language model's config, with the tower's name in it."""
        raw = self.config
        return "text_config" not in raw and ("mm_image_tower" in raw or "mm_vision_tower" in raw)

    @property
    def is_sparse(self) -> bool:
        """Whether it is a Mixture of Experts that was upcycled, here or by MoE-LLaVA."""
        return is_sparse(self.config)

    def require_start(self) -> None:
        """Sees to it that a run, or a conversion, can start from the folder.

        Raises:
            UserError: its weights are quantised, or it is one of ours and not what was written.
        """
        how = quantisation(self.config)
        if how:
            raise UserError(
                f"{self.called} holds weights that are quantised ({how}), which are neither trained nor converted. "
                "Give the folder in 16 bits that it was made from; --lora_enable True --bits 4 quantises it (QLoRA)."
            )
        check_digests(self.folder)
        for part in (self.base, self.tower):
            if part is not None:
                part.require_start()

    def refuse_exported_code(self) -> None:
        """Raises UserError for what `moellava export` has written with a file of code."""
        text = self.config.get("text_config") or {}
        if str(text.get("model_type", "")).startswith(REMOTE):
            raise UserError(
                f"{self.called} was exported with a file of code, for plain transformers "
                "(AutoModelForImageTextToText, trust_remote_code=True). Give the folder that it was exported from."
            )


def is_sparse(raw: Mapping[str, Any]) -> bool:
    """Whether a config, ours or a published one, is that of an upcycled model."""
    return bool(raw.get("moe")) and raw["moe"].get("moe_enable", True)


def quantisation(raw: Mapping[str, Any]) -> str | None:
    """How a config says that its weights are quantised; None: they are not."""
    for section in (raw, raw.get("text_config") or {}):
        settings = section.get("quantization_config")
        if settings:
            bits = [name for name in ("load_in_4bit", "load_in_8bit") if settings.get(name)]
            return " ".join([str(settings.get("quant_method", "unknown method")), *bits])
    return None


def read_folder(
    name: str | Path,
    flag: str,
    *,
    base: str | Path | None = None,
    near: Path | None = None,
    patterns: Sequence[str] = MODEL_FILES,
) -> Manifest:
    """Reads a folder, or what the hub keeps under an id.

    Args:
        name: folder or hub id.
        flag: the flag that named it.
        base: the language model of a published folder, or its tokenizer alone (`--model-base`).
        near: a folder in whose surroundings a relative `name` is looked for as well.
        patterns: files to fetch from the hub.

    Raises:
        UserError: no such folder, or no config.json in it; of a published one, the same of its tower.
    """
    folder = resolve_folder(name, flag, near, patterns)
    check_files(folder)
    below = None if base is None else _read_base(base)
    manifest = Manifest(folder, str(name), flag, checked_config(folder, flag), below)
    if not manifest.is_published:
        return manifest
    return replace(manifest, tower=read_folder(tower_name(manifest.config), "the config's image tower", near=folder))


def checked_config(folder: Path, flag: str) -> dict[str, Any]:
    """The config.json of a folder, its fields of the type that they have to be. Raises UserError otherwise."""
    config = read_config(folder, flag)
    for names, wanted, called in ((OBJECTS, dict, "an object, {…}"), (TEXTS, str, "a text")):
        for name in names:
            if config.get(name) is not None and not isinstance(config[name], wanted):
                raise UserError(f"{folder / CONFIG} is damaged: {name} is {str(config[name])[:40]!r}, not {called}.")
    section_of(config)
    return config


def tower_name(raw: Mapping[str, Any]) -> str:
    """The tower that a published config names. Raises UserError where it names a video tower as well, or none."""
    if raw.get("mm_video_tower"):
        raise UserError(f"This checkpoint has a video tower ({raw['mm_video_tower']}), which a composed model lacks.")
    name = raw.get("mm_image_tower") or raw.get("mm_vision_tower")
    if not name:
        raise UserError("This checkpoint's config names no image tower.")
    return name


def _read_base(name: str | Path) -> Manifest:
    flag = "--model-base"
    folder = resolve_folder(name, flag)
    check_files(folder)
    return Manifest(folder, str(name), flag, checked_config(folder, flag) if (folder / CONFIG).is_file() else {})
