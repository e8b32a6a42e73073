# SPDX-License-Identifier: Apache-2.0
"""A released model, described: its class is transformers' own, and its folder's processor and template are settled."""

from __future__ import annotations

import functools
from typing import Any

import torch

from moellava.constants import CHAT_TEMPLATE
from moellava.data.render import ChatRenderer
from moellava.data.render.own import own_template
from moellava.errors import UserError
from moellava.files import model_files
from moellava.lmm.any_released import keywords_of
from moellava.lmm.architecture import SUPPORTED_MODELS, Architecture, FieldView, registered, undisguised
from moellava.lmm.processors import load_processor
from moellava.lmm.remote import load_remote_config
from moellava.log import get_logger
from moellava.model.build import open_config, read
from moellava.model.description import Description
from moellava.model.extended import base_of
from moellava.model.manifest import Manifest, read_folder
from moellava.model.section import note, section_of
from moellava.model.towers import complete_processor

logger = get_logger(__name__)

LOADERS = FieldView("load", default=read)
"""Architecture -> what loads its model: (folder, config, dtype) -> model. See `moellava.model.build.read`."""


def find_model(
    model_id: str | None, model_local_path: str | None, trust_remote_code: bool = False
) -> tuple[Manifest, Architecture | None]:
    """The folder that `--model_id` and `--model_local_path` mean, and the architecture that the id stands for, or that
    the folder is found to be of; None if it is of none.

    Args:
        model_id: a registered id; alone, its weights come from the hub.
        model_local_path: a folder; with an id, the folder of that model.
        trust_remote_code: fetch the Python files of an architecture that needs them, too.

    Raises:
        UserError: an unknown id, or a folder of another architecture than the id's.
    """
    if model_id is None:
        assert model_local_path is not None
        manifest = read_folder(model_local_path, "--model_local_path", patterns=model_files(trust_remote_code))
        return manifest, registered(manifest)
    known = SUPPORTED_MODELS[model_id]
    architecture = known.architecture
    if model_local_path is None:
        patterns = model_files(architecture.remote_code and trust_remote_code)
        return read_folder(known.model_hf_path, f"--model_id {model_id}, which is", patterns=patterns), architecture
    manifest = read_folder(model_local_path, "--model_local_path")
    if architecture.model_type is not None and not architecture.fits(undisguised(manifest.config)):
        raise UserError(
            f"--model_id {model_id} is of the architecture {architecture.name}, but --model_local_path "
            f"{model_local_path} holds a model of type {manifest.config.get('model_type')!r}. Leave --model_id out to "
            "take the folder as what it is."
        )
    return manifest, architecture


def describe_released(manifest: Manifest, architecture: Architecture, trust_remote_code: bool = False) -> Description:
    """A released model's folder, as it was released or as a stage has left it.

    Args:
        manifest: of the folder.
        architecture: its entry, or one whose parts are to be found.
        trust_remote_code: run the code in the folder, for an architecture that transformers lacks.

    Raises:
        UserError: remote code is needed and not allowed, or does not run; transformers has no such class.
    """
    if architecture.remote_code and not trust_remote_code:
        raise UserError(
            f"{architecture.name} models need the Python code of their own repository. Read it, then add "
            "--trust_remote_code True to `moellava train` or `moellava merge-lora`; the other commands do not run it."
        )
    if architecture.load is None:
        base_of(manifest.config.get("model_type", ""))  # a class that is not there is told before files are looked for
    remote = architecture.remote_code
    config = (load_remote_config if remote else open_config)(manifest.folder, manifest.config)
    said = section_of(config)
    note(config, architecture=architecture.name, version=said.version if said else CHAT_TEMPLATE)

    @functools.cache
    def processor() -> Any:
        made = processor_of(manifest, architecture)
        complete_processor(made, config)
        return made

    @functools.cache
    def inputs() -> tuple[Any, Any]:
        settle(processor(), manifest, architecture)
        return processor().tokenizer, processor()

    def load(dtype: torch.dtype) -> Any:
        model = (architecture.load or read)(manifest.folder, config, dtype)
        if remote:
            model.config.image_token_id = inputs()[1].image_token_id
        return model

    keywords = architecture.keywords or (lambda: keywords_of(config, processor(), manifest.called))
    return Description(manifest.folder, config, keywords, inputs, load, architecture)


def processor_of(manifest: Manifest, architecture: Architecture) -> Any:
    """The processor of a folder, with whatever chat template is there. Raises UserError: files of it are missing."""
    if architecture.remote_processor is not None:
        return architecture.remote_processor(manifest.folder, manifest.config)
    return load_processor(manifest.folder, architecture, undisguised(manifest.config)["model_type"])


def settle(processor: Any, manifest: Manifest, architecture: Architecture) -> None:
    """Sees to it that `processor.chat_template` is the one that is trained on. Raises UserError: see
    `settle_template`."""
    if manifest.section is not None and manifest.section.version != CHAT_TEMPLATE:
        return  # a template of ours is beside it
    plain = undisguised(manifest.config)
    settle_template(processor, architecture, (plain.get("text_config") or plain).get("model_type", ""))


def settle_template(processor: Any, architecture: Architecture, text_model_type: str) -> None:
    """Sees to it that `processor.chat_template` is one that can be trained on: the folder's, or else the one on record.

    Raises:
        UserError: neither is there, or the folder's cannot be masked and there is none on record.
    """
    special = [token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special]
    recorded = architecture.template_for(text_model_type, special)
    own = own_template(processor.chat_template or processor.tokenizer.chat_template)
    if own is None and recorded is None:
        raise UserError(
            f"The folder has no chat template and none is on record for {architecture.name}: add a chat_template.jinja."
        )
    processor.chat_template = own or recorded
    try:
        renderer = ChatRenderer(processor, processor.chat_template, in_parts=True)
        stops = renderer.ends_with_special_token
        problem = "ends answers with no special token, so that a model trained on it would never stop"
    except UserError as error:
        stops, problem = False, str(error)
    if stops:
        processor.chat_template = renderer.template  # as it is trained on
        return
    if recorded is None or recorded == processor.chat_template:
        raise UserError(f"The chat template of {architecture.name} cannot be trained on: it {problem}.")
    logger.warning("The folder's chat template %s; the one on record for %s is used.", problem, architecture.name)
    processor.chat_template = recorded
