"""Conversations -> input ids and labels: LLaVA's `preprocess` functions as named rows over the masking engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from moellava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from moellava.conversation import Conversation, Piece, SeparatorStyle, conv_templates
from moellava.data.masking import Encoded, engine_for
from moellava.data.records import ROLES, Source, problem_of_turns
from moellava.data.render.chat import CHAT_TEMPLATE, chat_pieces, chat_terminator
from moellava.errors import DataError

OVERLONG = ("truncate", "error", "drop")


def preprocess(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    version: str,
    has_image: bool = False,
    max_length: int | None = None,
    overlong: str = "truncate",
    image_ids: Sequence[int] = (IMAGE_TOKEN_INDEX,),
) -> dict[str, list[torch.Tensor]]:
    """Tokenizes conversations and masks all but the answers and their terminators.

    Args:
        sources: conversations; a leading answer without a question is left out, as LLaVA does.
        tokenizer: of `load_tokenizer`.
        version: a name of `conv_templates`, or 'chat_template' for the tokenizer's own.
        has_image: whether `<image>` in human messages stands for an image; else it is text. In `plain` it always does.
        max_length: the longest sample, in ids, an image counting as `len(image_ids)`.
        overlong: what happens to a longer one: 'truncate' cuts its end, 'drop' leaves it out, 'error' raises.
        image_ids: what one image becomes.

    Returns:
        `input_ids` and `labels`: LongTensors [L] each, one per conversation that is kept.

    Raises:
        DataError: a conversation that is malformed, too long (`overlong="error"`), or has nothing left to train on.
        UnknownNameError: no such version.
    """
    if overlong not in OVERLONG:
        raise ValueError(f"overlong is {overlong!r} but must be one of {', '.join(OVERLONG)}")
    batch: dict[str, list[torch.Tensor]] = {"input_ids": [], "labels": []}
    for number, source in enumerate(sources):
        name = f"conversation {number}"
        encoded = encode_conversation(source, tokenizer, version, has_image, image_ids, name)
        if max_length is not None and len(encoded.ids) > max_length:
            if overlong == "error":
                raise DataError(f"{name} has {len(encoded.ids)} ids but at most {max_length} are allowed")
            if overlong == "drop":
                continue
            encoded = Encoded(encoded.ids[:max_length], encoded.labels[:max_length])
        if not encoded.is_trained:
            raise DataError(nothing_supervised(name, source, max_length))
        batch["input_ids"].append(as_tensor(encoded.ids))
        batch["labels"].append(as_tensor(encoded.labels))
    return batch


def encode_conversation(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    version: str,
    has_image: bool,
    image_ids: Sequence[int] = (IMAGE_TOKEN_INDEX,),
    name: str = "the conversation",
) -> Encoded:
    """Ids and labels of one conversation, at full length. Arguments and errors as of `preprocess`."""
    pieces = pieces_of(source, tokenizer, version, has_image, name)
    return engine_for(tokenizer).encode(pieces, is_multimodal(version, has_image), image_ids)


def encode_prompt(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    version: str,
    has_image: bool,
    image_ids: Sequence[int] = (IMAGE_TOKEN_INDEX,),
) -> list[int]:
    """Ids of a conversation that the human has the last word in, up to where the answer begins.

    They are the ids that training saw there. Arguments and errors as of `preprocess`.
    """
    pieces = pieces_of(source, tokenizer, version, has_image, opens=True)
    return engine_for(tokenizer).encode(pieces, is_multimodal(version, has_image), image_ids).ids


def is_plain(version: str) -> bool:
    """Whether a version is that of stage 1, which keeps only the image tags of a question."""
    return version != CHAT_TEMPLATE and conv_templates[version].sep_style is SeparatorStyle.PLAIN


def is_multimodal(version: str, has_image: bool) -> bool:
    """Whether `<image>` in a question stands for an image: if the record has one, and always in stage 1."""
    return has_image or is_plain(version)


def terminator_of(version: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What ends an answer, hence what stops generation."""
    return chat_terminator(tokenizer) if version == CHAT_TEMPLATE else conv_templates[version].terminator


def pieces_of(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    version: str,
    has_image: bool,
    name: str = "the conversation",
    opens: bool = False,
) -> list[Piece]:
    """A conversation, rendered; with `opens`, what opens the next answer follows it. Errors as of `preprocess`."""
    if version == CHAT_TEMPLATE:
        return chat_pieces(tokenizer, chat_turns(source, name), name, opens)
    conversation = conversation_of(source, version, has_image, name)
    if opens:
        conversation.append_message(conversation.roles[1], None)
    return conversation.pieces()


def chat_turns(source: Source, name: str = "the conversation") -> list[tuple[str, str]]:
    """A conversation with the roles of chat templates. Raises DataError as `conversation_of` does."""
    problem = problem_of_turns(source)
    if problem:
        raise DataError(f"{name} {problem}")
    turns = source[1:] if source[0]["from"] == ROLES[1] else source
    return [("user" if turn["from"] == ROLES[0] else "assistant", turn["value"]) for turn in turns]


def conversation_of(
    source: Source, version: str, has_image: bool = False, name: str = "the conversation"
) -> Conversation:
    """The template of `version` filled with a conversation.

    Raises:
        DataError: no turns, unknown roles, or roles that do not alternate.
    """
    conversation = conv_templates[version].start()
    wrapped = conversation.image_tag != DEFAULT_IMAGE_TOKEN and has_image
    for number, (_, text) in enumerate(chat_turns(source, name)):
        if wrapped and number % 2 == 0:
            bare = text.replace(conversation.image_tag, DEFAULT_IMAGE_TOKEN)
            text = bare.replace(DEFAULT_IMAGE_TOKEN, conversation.image_tag)
        conversation.append_message(conversation.roles[number % 2], text)
    return conversation


def as_tensor(numbers: Sequence[int]) -> torch.Tensor:
    """A LongTensor [L]. By way of numpy, which reads a list of ints five times as fast as torch does."""
    return torch.from_numpy(np.array(numbers, dtype=np.int64))


def nothing_supervised(name: str, source: Source, max_length: int | None) -> str:
    """The message for a sample that would train nothing."""
    cut = "" if max_length is None else f" within the first {max_length} ids"
    return f"{name} has no answer to train on{cut}: {str(source[0]['value'])[:80]!r} …"


def _row(version: str) -> Callable[..., dict[str, list[torch.Tensor]]]:
    """`preprocess` for one template, with the signature of LLaVA's function of that name."""

    def preprocess_row(
        sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, has_image: bool = False, **options: Any
    ) -> dict[str, list[torch.Tensor]]:
        return preprocess(sources, tokenizer, version=version, has_image=has_image, **options)

    preprocess_row.__name__ = preprocess_row.__qualname__ = f"preprocess_{version}"
    preprocess_row.__doc__ = f"`preprocess` with the template {version!r}; further options are passed on."
    return preprocess_row


preprocess_plain = _row("plain")
preprocess_v1 = _row("v1")
preprocess_llama_2 = _row("llama_2")
preprocess_qwen = _row("qwen")
preprocess_phi = _row("phi")
preprocess_stablelm = _row("stablelm")
preprocess_mistral = _row("mistral")
preprocess_openchat = _row("openchat")
preprocess_minicpm = _row("minicpm")
preprocess_mpt = _row("mpt")
