# SPDX-License-Identifier: Apache-2.0
"""Where an answer ends, and what of it is its text.

Shapes: B rows, L prompt tokens.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

UNSETTLED = re.compile(r"[\s\ufffd]+\Z")
"""White space, and what a tokenizer shows for a character whose last bytes have not come yet, at the end of a text."""

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
"""The tokens that SentencePiece spells with what its vocabulary lacks, one a byte of UTF-8."""


class Ending:
    r"""Where an answer ends: the one definition of it, and of its text.

    An answer ends with the tokenizer's end-of-sequence token, with one that the model's folder names beside it, or with
    the template's terminator. A terminator that
    holds a special token ("</s>", "\n</s>", "<|im_end|>\n") is over with that token, and the text before it is no part
    of the answer. One of plain text ("###", or "\n" of `plain`) is looked for in what the tokens say.

    Args:
        tokenizer: decodes the tokens.
        terminator: the text that ends an answer in the template; may be empty.
        config: the model's `generation_config`, which may name further tokens that end an answer.

    Attributes:
        stop_ids: tokens that end an answer, whatever they follow.
        plain: the terminator where it holds no special token, else "".
        lead: the terminator's text before its special token.
        window: tokens that `plain` spans at most, and one, whose leading space SentencePiece's decoder drops.
    """

    def __init__(self, tokenizer: Any, terminator: str, config: Any = None):
        self.tokenizer = tokenizer
        special = special_in(terminator, tokenizer)
        self.special_id = None if special is None else tokenizer.convert_tokens_to_ids(special)
        named = getattr(config, "eos_token_id", None)
        further = named if isinstance(named, list) else [named]
        self.stop_ids = sorted({tokenizer.eos_token_id, self.special_id, *further} - {None})
        self.plain = terminator if special is None else ""
        self.lead = "" if special is None else terminator.partition(special)[0]
        self.window = len(self.plain.encode()) + 1
        byte_ids = tokenizer.convert_tokens_to_ids(BYTE_TOKENS)
        self.byte_ids = byte_ids if len(set(byte_ids)) == len(BYTE_TOKENS) else []  # those it lacks are all `unk`
        self.byte_of = {token: byte for byte, token in enumerate(self.byte_ids)}

    def text(self, ids: Sequence[int]) -> str:
        """What an answer says, without terminator, special tokens, padding and white space around it."""
        ids = self.cut(ids)
        ended_by = ids.pop() if ids and ids[-1] in self.stop_ids else None
        said = self._decode(ids)
        if self.plain:
            said = said.split(self.plain, 1)[0]
        if ended_by is not None and ended_by == self.special_id:
            said = said.removesuffix(self.lead)
        return said.strip()

    def certain(self, ids: Sequence[int]) -> str:
        """The part of a growing answer's text that will not change.

        That is, without half a character, without what may become the terminator, and without spaces at its end.
        """
        text = UNSETTLED.sub("", self.text(ids))
        tail = self.plain or self.lead
        for size in range(min(len(tail), len(text)), 0, -1):
            if tail.startswith(text[-size:]):
                text = text[:-size]
                break
        return UNSETTLED.sub("", text)

    def cut(self, ids: Sequence[int]) -> list[int]:
        """The tokens up to the one that ends the answer, that included; what fills a row behind it goes."""
        ids = [token for token in ids if token >= 0]  # beams are filled with -1 where there is no stop token
        stop = next((place + 1 for place, token in enumerate(ids) if token in self.stop_ids), len(ids))
        ids = ids[:stop]
        if self.plain and self.plain in self._decode(ids):
            ids = ids[: next((size for size in range(1, stop) if self.is_said(ids[:size])), stop)]
        return ids

    def is_said(self, ids: Sequence[int]) -> bool:
        """Whether the last tokens say the terminator of plain text."""
        return bool(self.plain) and self.plain in self._decode(ids[-self.window :])

    def _decode(self, ids: Sequence[int]) -> str:
        ids = self._mended(ids)
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _mended(self, ids: Sequence[int]) -> list[int]:
        """The same tokens, but bytes that make no character replaced by those of the replacement character.

        A tokenizer shows all of a run of byte tokens as replacement characters if one byte of it is off. A newline
        behind half a character would go unseen, and characters would vanish that a stream has shown already.
        """
        if not self.byte_of or self.byte_of.keys().isdisjoint(ids):
            return list(ids)
        mended: list[int] = []
        for are_bytes, run in itertools.groupby(ids, key=self.byte_of.__contains__):
            if are_bytes:
                text = bytes(self.byte_of[token] for token in run).decode("utf-8", errors="replace")
                mended += [self.byte_ids[byte] for byte in text.encode()]
            else:
                mended += run
        return mended


def special_in(text: str, tokenizer: Any) -> str | None:
    """The first added token in a text, the longest that begins there; runs of spaces, which Phi-2 adds, aside."""
    found = [token for token in tokenizer.get_added_vocab() if token.strip() and token in text]
    return min(found, key=lambda token: (text.index(token), -len(token)), default=None)


class SaysTerminator(StoppingCriteria):
    """Ends the rows that say a terminator of plain text.

    Args:
        ending: what to look for.
        prompt_length: L; the prompt says terminators too.
    """

    def __init__(self, ending: Ending, prompt_length: int):
        self.ending = ending
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        begin = max(self.prompt_length, input_ids.shape[1] - self.ending.window)
        ended = [self.ending.is_said(row) for row in input_ids[:, begin:].tolist()]
        return torch.tensor(ended, device=input_ids.device)
