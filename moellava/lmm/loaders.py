"""A released model from its folder: one loader for every class of transformers, others only where something differs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moellava.data.media_reader import MediaReader
from moellava.errors import UserError
from moellava.files import CODE_FILES, MODEL_FILES, read_config, resolve_folder
from moellava.lmm.architecture import SUPPORTED_MODELS, Architecture, FieldView, architecture_of, undisguised
from moellava.lmm.parts import bring_parts
from moellava.lmm.processors import load_processor
from moellava.lmm.prompts import ChatTemplate, ends_answers
from moellava.lmm.remote import load_remote_model
from moellava.log import get_logger
from moellava.model.extended import PREFIX, base_of, extended_class
from moellava.model.loading import read

logger = get_logger(__name__)


@dataclass
class ReleasedModel:
    """A released model, ready to train.

    Args:
        model: of its own Hugging Face class, or of that class extended by MoE layers.
        processor: its own; `processor.chat_template` is the template that is trained on.
        family: its architecture.
        folder: where it came from.
    """

    model: Any
    processor: Any
    family: Architecture
    folder: Path

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @functools.cached_property
    def reader(self) -> MediaReader:
        """What asks the processor about images and videos; made once, for making it asks already."""
        return MediaReader(self.processor)


def find_model(
    model_id: str | None, model_local_path: str | None, trust_remote_code: bool = False
) -> tuple[Path, dict[str, Any], Architecture]:
    """The folder, config.json and architecture that `--model_id` and `--model_local_path` mean.

    Args:
        model_id: a registered id; alone, its weights come from the hub.
        model_local_path: a folder; with an id, the folder of that model.
        trust_remote_code: fetch the Python files of an architecture that needs them, too.

    Raises:
        UserError: an unknown id, a folder of no known architecture, or of another than the id's.
    """
    if model_local_path is None:
        assert model_id is not None
        known = SUPPORTED_MODELS[model_id]
        patterns = MODEL_FILES + (CODE_FILES if known.architecture.remote_code and trust_remote_code else ())
        folder = resolve_folder(known.model_hf_path, f"--model_id {model_id}, which is", patterns=patterns)
        return folder, read_config(folder, "--model_id"), known.architecture
    folder = resolve_folder(model_local_path, "--model_local_path")
    raw = read_config(folder, "--model_local_path")
    if model_id is None:
        return folder, raw, architecture_of(raw, f"--model_local_path {folder}")
    architecture = SUPPORTED_MODELS[model_id].architecture
    if architecture.model_type is not None and not architecture.fits(undisguised(raw)):
        raise UserError(
            f"--model_id {model_id} is of the architecture {architecture.name}, but --model_local_path {folder} holds "
            f"a model of type {raw.get('model_type')!r}. Leave --model_id out to take the folder as what it is."
        )
    return folder, raw, architecture


def load_lmm(
    folder: Path,
    raw: dict[str, Any],
    architecture: Architecture,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> ReleasedModel:
    """Opens a released model, by the loader of its architecture.

    Args:
        folder, raw, architecture: of `find_model`.
        dtype: of the weights.
        trust_remote_code: run the code in the folder, for an architecture that transformers lacks.

    Raises:
        UserError: remote code is needed and not allowed, or does not run; weights or files of the processor are
            missing; the chat template cannot be masked.
    """
    if architecture.remote_code and not trust_remote_code:
        raise UserError(
            f"{architecture.name} models need the Python code of their own repository. Read it, then add "
            "--trust_remote_code True."
        )
    load = architecture.load or (load_remote if architecture.remote_code else load_native)
    return load(folder, raw, architecture, dtype=dtype)


def load_native(folder: Path, raw: dict[str, Any], architecture: Architecture, *, dtype: torch.dtype) -> ReleasedModel:
    """The loader of every architecture that has a class in transformers."""
    model_class = model_class_of(raw)
    # First: a file that is missing is told before gigabytes are read.
    processor = load_processor(folder, architecture, undisguised(raw)["model_type"])
    model = read(model_class, folder, dtype)
    bring_parts(model, architecture.keywords)
    settle_template(processor, architecture, model.config.get_text_config().model_type)
    return ReleasedModel(model, processor, architecture, folder)


def load_remote(folder: Path, raw: dict[str, Any], architecture: Architecture, **options: Any) -> ReleasedModel:
    """The loader of architectures whose code lies in the folder."""
    assert architecture.remote_processor is not None
    model = load_remote_model(folder, raw, **options)
    bring_parts(model, architecture.keywords)
    processor = architecture.remote_processor(folder, raw)
    model.config.image_token_id = processor.image_token_id
    settle_template(processor, architecture, raw["model_type"])
    return ReleasedModel(model, processor, architecture, folder)


LOADERS = FieldView("load", default=load_native)
"""Architecture -> its loader; arguments as of `load_native`."""


def model_class_of(raw: dict[str, Any]) -> Any:
    """The class of a folder, by its config.json: transformers' own, extended where moellava has added MoE layers."""
    base = base_of(raw["model_type"])
    return extended_class(base) if raw["model_type"].startswith(PREFIX) else base


def settle_template(processor: Any, architecture: Architecture, text_model_type: str) -> None:
    """Sees to it that `processor.chat_template` is one that can be trained on: the folder's, or else the one on record.

    Raises:
        UserError: neither is there, or the folder's cannot be masked and there is none on record.
    """
    special = [token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special]
    recorded = architecture.template_for(text_model_type, special)
    own = processor.chat_template or processor.tokenizer.chat_template
    if own is None and recorded is None:
        raise UserError(
            f"The folder has no chat template and none is on record for {architecture.name}: add a chat_template.jinja."
        )
    processor.chat_template = own or recorded
    try:
        stops = ends_answers(ChatTemplate(processor, processor.chat_template))
        problem = "ends answers with no special token, so that a model trained on it would never stop"
    except UserError as error:
        stops, problem = False, str(error)
    if stops:
        return
    if recorded is None or recorded == processor.chat_template:
        raise UserError(f"The chat template of {architecture.name} cannot be trained on: it {problem}.")
    logger.warning("The folder's chat template %s; the one on record for %s is used.", problem, architecture.name)
    processor.chat_template = recorded
