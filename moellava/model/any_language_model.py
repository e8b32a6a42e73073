# SPDX-License-Identifier: Apache-2.0
"""A language model of no registered family: opened by its own class, probed, and taken apart for a composed model."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlavaConfig,
    PretrainedConfig,
)

from moellava.errors import UnknownNameError, UserError
from moellava.log import get_logger
from moellava.model.build import REPORT, check_loaded, quietly
from moellava.model.families import FAMILIES
from moellava.model.manifest import Manifest
from moellava.model.probes import FAILURES, Anatomy, CannotComposeError, anatomy_of
from moellava.model.section import note
from moellava.model.stored import dtype_of_part
from moellava.model.weights import require_sizes, shapes_in

logger = get_logger(__name__)

BODY, HEAD = "model.language_model", "lm_head"
"""Where LLaVA has a language model's parts."""


def own_config(llm: Manifest) -> PretrainedConfig:
    """The config of a language model of no family, as its own class has it.

    Raises:
        UnknownNameError: the installed transformers has no class for it.
        UserError: it does not read its config.json.
    """
    model_type = str(llm.config.get("model_type"))
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        read = ", ".join(sorted({name for family in FAMILIES.values() for name in family.base_model_types}))
        raise UnknownNameError(
            f"{llm.called} is a {model_type!r} model. The installed transformers {transformers.__version__} has no "
            f"class for causal language models of that type, and it is of no family here. Known: {read}"
        )
    try:
        config = CONFIG_MAPPING[model_type].from_pretrained(llm.folder, trust_remote_code=False)
    except (*FAILURES, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{llm.called}: transformers does not read its config.json: {reason}") from error
    for name in ("hidden_size", "vocab_size"):
        if not isinstance(getattr(config, name, None), int):
            raise UserError(f"{llm.called} has no {name} in its config, so no projector can be made for it.")
    config.architectures = None
    if not hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = False  # LlavaConfig asks every text config
    return config


def own_tensors(llm: Manifest, config: LlavaConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of such a language model under a composed model's names.

    Args:
        config: of the composed model; told here how the head comes about, which only the weights' class can say.
        dtype: of all weights.

    Raises:
        UserError: a damaged folder, or a model that Hugging Face's LLaVA cannot hold, with the reason.
    """
    model = open_causal_lm(llm, dtype_of_part(llm.folder, dtype))
    try:
        anatomy = anatomy_of(model)
    except CannotComposeError as error:
        name = type(model).__name__
        raise CannotComposeError(f"{llm.called} ({name}) cannot be composed with a tower: {error}.") from error
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = anatomy.ties_head
    note(config, softcap=anatomy.head.softcap)
    logger.info("%s (%s) is composed %s.", llm.called, type(model).__name__, in_words(anatomy))
    return taken_apart(model, anatomy, dtype)


def open_causal_lm(llm: Manifest, dtype: torch.dtype) -> Any:
    """A language model by its own class, which knows what its tensors are called on disk. Raises UserError: weights
    that do not fit its config."""
    with quietly():
        try:
            config = AutoConfig.from_pretrained(llm.folder, trust_remote_code=False)
            require_sizes(config, shapes_in(llm.folder), llm.called)
            model, info = AutoModelForCausalLM.from_pretrained(
                llm.folder, dtype=dtype, trust_remote_code=False, **REPORT
            )
        except (OSError, RuntimeError) as error:
            raise UserError(f"{llm.called} cannot be read: {str(error).strip().splitlines()[0]}") from error
    check_loaded(info, llm.called)
    return model.eval()


def taken_apart(model: Any, anatomy: Anatomy, dtype: torch.dtype) -> dict[str, Tensor]:
    """Body and head of a causal language model under a composed model's names, constants folded into the weights; what
    is computed so is in `dtype`, unless the weights are in a wider one."""
    wide = torch.promote_types(model.get_input_embeddings().weight.dtype, dtype)
    embedding = model.get_input_embeddings().weight
    words = {name for name, tensor in anatomy.body.named_parameters(remove_duplicate=False) if tensor is embedding}
    state = {
        f"{BODY}.{name}": scaled(tensor, anatomy.embedding_scale if name in words else 1.0, wide)
        for name, tensor in anatomy.body.state_dict().items()
    }
    if not anatomy.ties_head:
        state[f"{HEAD}.weight"] = scaled(anatomy.head.weight.detach(), anatomy.head.scale, wide)
    if anatomy.head.bias is not None:
        state[f"{HEAD}.bias"] = anatomy.head.bias.to(wide)
    return state


def scaled(tensor: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """The tensor itself, or it times a constant, in a dtype."""
    return tensor if factor == 1.0 else (tensor.float() * factor).to(dtype)


def in_words(anatomy: Anatomy) -> str:
    """What had to be done to a language model, for the log."""
    head = anatomy.head
    done = [
        (anatomy.unties_head, "its head stored apart from the embedding"),
        (head.scale != 1.0, f"its logits' factor {head.scale:.6g} folded into the head"),
        (anatomy.embedding_scale != 1.0, f"its words' factor {anatomy.embedding_scale:.6g} folded into the embedding"),
        (head.bias is not None, "its head with a bias"),
        (head.softcap is not None, f"its logits capped at {head.softcap}"),
    ]
    return ", ".join(words for is_so, words in done if is_so) or "as it is"
