# SPDX-License-Identifier: Apache-2.0
"""From named tensors to a model: missing, unexpected and misshapen weights are errors, never a warning."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel, logging
from transformers.utils import GENERATION_CONFIG_NAME

from moellava.auto_classes import PREFIX
from moellava.errors import UserError
from moellava.model.extended import as_extended, base_of, extended_config, extension_of, model_class
from moellava.model.families import Family
from moellava.model.hooks import hang_hooks
from moellava.model.projectors import parse_projector
from moellava.model.projectors.layers import pin_identities
from moellava.model.section import section_of
from moellava.model.stored import Stored, note_meant, to_load
from moellava.model.weights import require_sizes

ROPE_FIELDS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
"""Older names of what is `rope_parameters` today; Hugging Face still reads them, though they are no fields any more."""

SHOWN_KEYS = 6

REPORT = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Makes `from_pretrained` tell all that did not fit, and not stop at the first; `check_loaded` then says it."""


def text_config(family: Family, fields: Mapping[str, Any]) -> PretrainedConfig:
    """The Hugging Face config of a family's language model, from fields under Hugging Face's names.

    Fields that its config class lacks are left out: a published config holds the tower's and the trainer's as well.
    One that is null stays null where the class lets it be: `sliding_window: null` is no window, not the default one.
    """
    cls = CONFIG_MAPPING[family.text_model_type]
    known = set(cls().to_dict()) | set(ROPE_FIELDS)
    may_be_null = {field.name for field in dataclasses.fields(cls) if type(None) in get_args(field.type)}
    dropped = {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype"}
    null = {name for name, value in fields.items() if value is None} - (may_be_null - {"rope_parameters"})
    kept = {name: value for name, value in fields.items() if name in known - dropped - null}
    return AutoConfig.for_model(family.text_model_type, **kept)


def build(config: PretrainedConfig, state: Mapping[str, torch.Tensor], dtype: torch.dtype, source: str) -> Any:
    """A composed model that holds exactly `state`.

    The structure is built without memory and takes the tensors one by one, so tensors that are mapped from disk are
    read once, into their final dtype; inside `as_stored`, not yet.

    Args:
        config: a `LlavaConfig`; what it asks for decides the class.
        state: tensors under the composed model's names.
        source: where they come from, for the message.

    Raises:
        UserError: a tensor is missing, of another shape, or has no place.
    """
    config = as_extended(config) if extension_of(config).reasons else config
    require_sizes(config, [tuple(tensor.shape) for tensor in state.values()], source)
    return _opened(None, config, state, dtype, source)


def _opened(
    folder: Path | None,
    config: PretrainedConfig,
    state: Mapping[str, torch.Tensor] | None,
    dtype: torch.dtype,
    source: str,
) -> Any:
    taken = to_load(folder, config, state)
    with quietly():
        model, info = class_of(config).from_pretrained(
            folder if taken is None else None,
            config=config,
            state_dict=taken,
            dtype=dtype,
            trust_remote_code=False,
            **REPORT,
        )
    check_loaded(info, source)
    part_memory(model)
    if taken is not None and folder is not None:  # what Hugging Face takes of a folder beside its weights
        model.config.name_or_path = model.name_or_path = str(folder)
        if (folder / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    pin(model)
    if taken and any(isinstance(tensor, Stored) for tensor in taken.values()):
        note_meant(model, on_meta(model.config, dtype), dtype)  # whose parts are to be in it, too
    keep_head(model)
    hang_hooks(model)
    return model.eval()


def part_memory(model: torch.nn.Module) -> None:
    """Gives every parameter memory of its own: two that share it, as of a head that was the embedding or in a pickle,
    would each be moved by the steps of both."""
    places: set[int] = set()
    for parameter in model.parameters():
        place = parameter.data_ptr()
        if place and place in places:  # 0: on meta
            parameter.data = parameter.data.clone()
        places.add(place)


def keep_head(model: Any) -> None:
    """Makes the config say what the tensors are: a head that is not the embedding is one of its own, whatever it said.

    Hugging Face loads both where both are there and differ; on saving, the head of a config with ties would be lost.
    """
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False) and head is not None and head.weight is not words.weight:
            config.tie_word_embeddings = False


def read(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """The model of a folder in Hugging Face's layout.

    Args:
        folder: weights under the names of the model's class, of today or of the hub.
        config: of `open_config`.
        dtype: of all weights.

    Raises:
        UserError: see `build`.
    """
    return _opened(folder, config, None, dtype, str(folder))


def open_config(folder: Path, raw: Mapping[str, Any]) -> PretrainedConfig:
    """The config of a folder in Hugging Face's layout, extended or not.

    Args:
        raw: its config.json.
    """
    if raw["model_type"].startswith(PREFIX):
        return extended_config(base_of(raw["model_type"]).config_class).from_pretrained(folder, trust_remote_code=False)
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def on_meta(config: PretrainedConfig, dtype: torch.dtype | None = None) -> Any:
    """The structure of a config's model, without memory. `dtype`: of its weights; None: torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device("meta"):
            return class_of(config)(config)
    finally:
        torch.set_default_dtype(before)


def class_of(config: PretrainedConfig) -> Any:
    """The model class of a vision-language model's config, composed or released, extended where it asks for that."""
    return model_class(config, base_of(config.model_type))


@contextmanager
def quietly() -> Iterator[None]:
    """Keeps Hugging Face's report of what did not fit from the terminal: `check_loaded` raises it."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def pin(model: PreTrainedModel) -> None:
    """Puts constants where our config says that the projector does not learn."""
    section = section_of(model.config)
    if section is not None and section.image_projector_type is not None:
        pin_identities(model.model.multi_modal_projector, parse_projector(section.image_projector_type))


def check_loaded(info: Mapping[str, Any], source: str) -> None:
    """Raises UserError unless every weight of the model was there, in its shape, and nothing was left over."""
    problems = []
    for fault in ("missing", "unexpected"):
        keys = sorted(info[f"{fault}_keys"])
        if keys:
            more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
            problems.append(f"{fault}: {', '.join(keys[:SHOWN_KEYS])}{more}")
    for key, found, wanted in sorted(info["mismatched_keys"])[:SHOWN_KEYS]:
        problems.append(f"{key} is {tuple(found)}, but its config says {tuple(wanted)}")
    if problems:
        raise UserError(f"The weights of {source} do not fit its config.json. " + "; ".join(problems))
