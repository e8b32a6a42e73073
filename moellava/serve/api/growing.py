# SPDX-License-Identifier: Apache-2.0
"""One answer of a batch while it grows: its text up to what is certain, where it stops, how likely its tokens were.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from moellava.serve.ending import UNSETTLED, Ending

ANCHOR = "a"
"""A token is decoded behind this, for the decoder of SentencePiece drops the space at a text's beginning."""


@dataclass
class Token:
    """A token that was said.

    Attributes:
        text: what it says; half a character is U+FFFD.
        logprob: natural logarithm of its probability, before temperature.
        likely: texts and logarithms of the likeliest tokens, the likeliest first.
    """

    text: str
    logprob: float
    likely: list[tuple[str, float]] = field(default_factory=list)


@dataclass
class Piece:
    """What an answer has gained: text, and the tokens since the piece before (none where they are not asked for)."""

    text: str
    tokens: list[Token] = field(default_factory=list)


class Growing:
    """One row.

    Args:
        ending: where answers of the model end.
        stops: texts that end this one.
        limit: its longest, in tokens.
        top_logprobs: see `Question`.
        tell: is handed each piece.
        is_left: whether nobody reads it any more.

    Attributes:
        ids: tokens so far, the one that ended it included.
        reason: why it ended, 'stop' or 'length'; None: it grows.
    """

    def __init__(
        self,
        ending: Ending,
        stops: Sequence[str],
        limit: int,
        top_logprobs: int | None,
        tell: Callable[[Piece], None],
        is_left: Callable[[], bool],
    ):
        self.ending, self.stops, self.limit, self.top_logprobs = ending, tuple(stops), limit, top_logprobs
        self.tell, self.is_left = tell, is_left
        self.ids: list[int] = []
        self.reason: str | None = None
        self.shown = ""
        self.tokens: list[Token] = []
        self.told = 0

    def take(self, token: int, logprob_V: Tensor | None) -> bool:
        """Takes the next token and tells what is certain. Returns whether the answer is over."""
        self.ids.append(token)
        if logprob_V is not None and self.top_logprobs is not None:
            self.tokens.append(self._told_of(token, logprob_V))
        is_over = token in self.ending.stop_ids or self.ending.is_said(self.ids)
        certain = self.ending.certain(self.ids)
        stop = self._stop_in(certain)
        if is_over or stop is not None:
            self.reason = "stop"
        elif len(self.ids) >= self.limit:
            self.reason = "length"
        else:
            self._show(self._held_back(certain))
            return self.is_left()
        self._finish()
        return True

    def _finish(self) -> None:
        """Tells the rest."""
        text = self.ending.text(self.ids)
        stop = self._stop_in(text)
        if stop is not None:
            self.reason = "stop"
            text = text[:stop].rstrip()
        if self.tokens:
            said = next(
                (count for count in range(len(self.ids)) if len(self.ending.text(self.ids[:count])) >= len(text)),
                len(self.ids),
            )
            self.tokens = self.tokens[:said]
        self._show(text, is_last=True)

    def _show(self, text: str, is_last: bool = False) -> None:
        """Tells what a text has gained, if it still begins as what was shown."""
        grown = text[len(self.shown) :] if text.startswith(self.shown) else ""
        tokens = self.tokens[self.told :]
        if grown or (is_last and tokens):
            self.told = len(self.tokens)
            self.shown += grown
            self.tell(Piece(grown, tokens))

    def _stop_in(self, text: str) -> int | None:
        """Where the first text that stops the answer begins."""
        return min((text.index(stop) for stop in self.stops if stop in text), default=None)

    def _held_back(self, text: str) -> str:
        """A text without what may become one that stops the answer."""
        kept = len(text)
        for stop in self.stops:
            sizes = range(min(len(stop) - 1, len(text)), 0, -1)
            kept = min(kept, len(text) - next((size for size in sizes if text.endswith(stop[:size])), 0))
        return UNSETTLED.sub("", text[:kept])

    def _told_of(self, token: int, logprob_V: Tensor) -> Token:
        values, ids = logprob_V.topk(min(self.top_logprobs or 0, len(logprob_V)))
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        likely = [(self._text_of(one), finite(value)) for one, value in pairs]
        return Token(self._text_of(token), finite(float(logprob_V[token])), likely)

    def _text_of(self, token: int) -> str:
        decode: Any = self.ending.tokenizer.decode
        first = self.ending.tokenizer.encode(ANCHOR, add_special_tokens=False)
        return decode([*first, token])[len(decode(first)) :]


def finite(logprob: float) -> float:
    """A logarithm that JSON can write: -9999 is OpenAI's word for 'never'."""
    return logprob if logprob > -math.inf else -9999.0


class Likelihoods(LogitsProcessor):
    """Keeps how likely each token is at this step, [B, V]; changes nothing."""

    def __init__(self) -> None:
        self.logprob_BV: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.logprob_BV = scores.float().log_softmax(-1)
        return scores


class Rows(StoppingCriteria):
    """Hands each row of a batch its tokens, and ends the rows that are over.

    Args:
        rows: one a row; None where nobody reads it.
        likelihoods: of the same run; None where nobody asks.
    """

    def __init__(self, rows: Sequence[Growing], likelihoods: Likelihoods | None = None):
        self.rows = list(rows)
        self.likelihoods = likelihoods
        self.over = [False] * len(self.rows)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        logprob_BV = self.likelihoods and self.likelihoods.logprob_BV
        for number, token in enumerate(input_ids[:, -1].tolist()):
            if not self.over[number]:
                logprob_V = None if logprob_BV is None else logprob_BV[number]
                self.over[number] = self.rows[number].take(token, logprob_V)
        return torch.tensor(self.over, device=input_ids.device)
