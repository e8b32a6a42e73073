"""Folders of vision-language models, composed or released: which of the two, opened alike, probed alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from moellava.constants import CHAT_TEMPLATE, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moellava.files import read_config
from moellava.lmm.architecture import ARCHITECTURES, Architecture, undisguised
from moellava.lmm.family_collators import collator_for
from moellava.lmm.loaders import find_model, load_lmm
from moellava.model.builder import load_pretrained_model
from moellava.model.probe import probe_batches

PROBE_TOKENS = 24

Probes = dict[str, dict[str, Any]]
"""'text' and 'image' -> inputs of the model."""


@dataclass
class OpenFolder:
    """A vision-language model from its folder.

    Args:
        model: in evaluation mode.
        tokenizer, processor: its own.
        family: of a released model; None for a composed one.
    """

    model: Any
    tokenizer: Any
    processor: Any
    family: Architecture | None

    def probes(self) -> Probes:
        """What two models of this kind are compared on."""
        if self.family is None:
            return probe_batches(self.model.config, self.model.dtype)
        return released_probes(self.model.config, self.processor, self.family, self.model.dtype)


def is_released(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is a released model's. A composed model's names the template that it was trained with."""
    extras = raw.get("moellava") or {}
    if "lmm_family" in extras:
        return True
    return "version" not in extras and any(
        architecture.fits(undisguised(raw)) for architecture in ARCHITECTURES.values()
    )


def mark_released(config: Any, family: Architecture) -> None:
    """Writes into a config's `moellava` section what it says of every released model; all else there stays."""
    section = {"version": CHAT_TEMPLATE, "lmm_family": family.name}
    config.moellava = (getattr(config, "moellava", None) or {}) | section


def open_folder(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> OpenFolder:
    """Opens a folder on the CPU, for comparing and converting.

    Raises:
        UserError: as of `load_lmm` for a released model, as of `load_pretrained_model` for a composed one.
    """
    if not is_released(read_config(folder, "--model-path")):
        tokenizer, model, processor, _ = load_pretrained_model(folder, device="cpu", dtype=dtype)
        return OpenFolder(model, tokenizer, processor, None)
    _, raw, family = find_model(None, str(folder))
    released = load_lmm(folder, raw, family, dtype=dtype, trust_remote_code=trust_remote_code)
    mark_released(released.model.config, family)
    return OpenFolder(released.model, released.tokenizer, released.processor, family)


def released_probes(
    config: Any, processor: Any, family: Architecture, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Probes:
    """Random text, and random text around a random image, as inputs of a released model.

    Args:
        config: the model's.
        processor: its own; it makes of the image whatever the model reads.
        family: its architecture.
        dtype: of the pixels.
        seed: of ids and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    words = min(processor.tokenizer.vocab_size, config.get_text_config().vocab_size)
    ids = torch.randint(words // 2, words, (PROBE_TOKENS,), generator=generator)
    half = PROBE_TOKENS // 2
    pixels = torch.randint(0, 256, (56, 56, 3), generator=generator, dtype=torch.uint8)
    around = torch.cat([ids[:half], torch.tensor([IMAGE_TOKEN_INDEX]), ids[half:]])
    sample = {
        "input_ids": around,
        "labels": torch.full_like(around, IGNORE_INDEX),
        "images": [Image.fromarray(pixels.numpy())],
        "record": "probe",
    }
    with_image = collator_for(family.name, processor)([sample])
    del with_image["labels"]
    shown = {name: value.to(dtype) if value.is_floating_point() else value for name, value in with_image.items()}
    return {"text": {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}, "image": shown}
