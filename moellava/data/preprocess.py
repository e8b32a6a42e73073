# SPDX-License-Identifier: Apache-2.0
"""Conversations -> input ids and labels: LLaVA's `preprocess` functions as named rows over the masking engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from moellava import conversation
from moellava.constants import IMAGE_TOKEN_INDEX
from moellava.data.masking import Encoded, engine_for
from moellava.data.records import Source, trained_answers
from moellava.data.render import renderer_for
from moellava.errors import DataError

OVERLONG = ("truncate", "error", "drop")


def preprocess(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    version: str | None = None,
    has_image: bool = False,
    max_length: int | None = None,
    overlong: str = "truncate",
    image_ids: Sequence[int] = (IMAGE_TOKEN_INDEX,),
) -> dict[str, list[torch.Tensor]]:
    """Tokenizes conversations and masks all but the answers and their terminators.

    Args:
        sources: conversations; a leading answer without a question is left out, as LLaVA does.
        tokenizer: of `load_tokenizer`.
        version: a name of `conv_templates`, or 'chat_template' for the tokenizer's own; None: that of
            `conversation.default_conversation`, which LLaVA's guides set.
        has_image: whether `<image>` in human messages stands for an image; else it is text. In `plain` it always does.
        max_length: the longest sample, in ids, an image counting as `len(image_ids)`.
        overlong: what happens to a longer one: 'truncate' cuts its end, 'drop' leaves it out, 'error' raises.
        image_ids: what one image becomes.

    Returns:
        `input_ids` and `labels`: LongTensors [L] each, one per conversation that is kept, or one per trained answer of
        it where the chat template rewrites earlier turns.

    Raises:
        DataError: a conversation that is malformed, too long (`overlong="error"`), or has nothing left to train on.
        UnknownNameError: no such version.
    """
    if overlong not in OVERLONG:
        raise ValueError(f"overlong is {overlong!r} but must be one of {', '.join(OVERLONG)}")
    version = version or conversation.default_conversation.version
    batch: dict[str, list[torch.Tensor]] = {"input_ids": [], "labels": []}
    for number, source in enumerate(sources):
        name = f"conversation {number}"
        for encoded in encode_conversation(source, tokenizer, version, has_image, image_ids, name):
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
) -> list[Encoded]:
    """Ids and labels of one conversation, at full length: one text, or one for each trained answer. Arguments and
    errors: see `preprocess`."""
    renderer = renderer_for(version, tokenizer)
    texts, trained = renderer.texts(source, has_media=has_image, name=name), trained_answers(source)
    found = []
    for pieces, answers in texts:
        if len(texts) > 1 and not trained[answers[0]]:
            continue
        encoded = engine_for(tokenizer).encode(pieces, renderer.places_media(has_image), image_ids)
        encoded.silence([trained[number] for number in answers])
        found.append(encoded)
    return found


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
