# SPDX-License-Identifier: Apache-2.0
"""A released model of no registered architecture: opened by its own class, and taken apart by what probes find.

Its template is its processor's own, its samples are made as for every model, and what cannot be done with it is said
before anything trains.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from moellava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moellava.data.collate import MediaCollator
from moellava.data.media_reader import MediaReader, blank
from moellava.model.parts import Keywords
from moellava.model.section import note, section_of
from moellava.model.vision_probes import PartsError, find_parts, on_paper


def keywords_of(config: PretrainedConfig, processor: Any, called: str) -> Keywords:
    """Where the parts of a model are: as its folder says, or as probes find, which is noted for its folder.

    Args:
        config: of the model; may be extended.
        processor: of the model.
        called: how messages name the folder.

    Raises:
        UserError: its processor cannot be asked, or its parts cannot be told apart; with the reason.
    """
    section = section_of(config)
    if section is not None and section.parts is not None:
        return Keywords(**{field: tuple(names) for field, names in section.parts.items()})
    model = on_paper(config)
    try:
        keywords = find_parts(model, probe_batch(processor))
    except PartsError as error:
        raise PartsError(f"{called} ({type(model).__name__}) cannot be taken apart: {error}.") from error
    note(config, parts={field: list(names) for field, names in keywords._asdict().items()})
    return keywords


def probe_batch(processor: Any, collator_class: type[MediaCollator] | None = None) -> dict[str, torch.Tensor]:
    """A few words about an image, as inputs of a model, whatever its template. Raises UserError: see `MediaReader`.

    Args:
        processor: of the model.
        collator_class: of its architecture; None: the one of all others.
    """
    reader = MediaReader(processor)
    tokenizer = processor.tokenizer
    words = tokenizer("a picture", add_special_tokens=False).input_ids
    ids = torch.tensor([*words, IMAGE_TOKEN_INDEX, *words])
    sample = {"input_ids": ids, "labels": torch.full_like(ids, IGNORE_INDEX), "media": [blank("image")]}
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    collator = (collator_class or MediaCollator)(reader, end if pad is None else pad)
    batch = collator.of_prompts()([sample | {"record": "the probe"}])
    return {name: value.float() if is_real(value) else value for name, value in batch.items()}


def is_real(value: Any) -> bool:
    """Whether an input is a tensor of real numbers, in whatever precision its processor gives them."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()
