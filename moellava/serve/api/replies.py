# SPDX-License-Identifier: Apache-2.0
"""Answers as OpenAI's API writes them."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moellava.serve.api.growing import Piece, Token
from moellava.serve.api.scheduler import Finished

DONE = "data: [DONE]\n\n"
"""The end of a stream."""


@dataclass
class Reply:
    """What one answer is wrapped in.

    Args:
        model: the model's name.
        tells_likelihoods: whether `logprobs` are told.
    """

    model: str
    tells_likelihoods: bool
    identity: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, pieces: Sequence[Piece], end: Finished) -> dict[str, Any]:
        """An answer that is complete."""
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        tokens = [token for piece in pieces for token in piece.tokens]
        choice = {"index": 0, "message": message, "logprobs": self._likelihoods(tokens), "finish_reason": end.reason}
        return self._object("chat.completion", choices=[choice], usage=usage(end))

    def chunk(self, delta: dict[str, Any], tokens: Sequence[Token] = (), reason: str | None = None) -> str:
        """A piece of a stream."""
        told = self._likelihoods(tokens) if tokens else None
        choice = {"index": 0, "delta": delta, "logprobs": told, "finish_reason": reason}
        return event(self._object("chat.completion.chunk", choices=[choice]))

    def last_chunk(self, end: Finished) -> str:
        """The piece behind the last one, which tells the usage."""
        return event(self._object("chat.completion.chunk", choices=[], usage=usage(end)))

    def _object(self, name: str, **content: Any) -> dict[str, Any]:
        return {"id": self.identity, "object": name, "created": self.created, "model": self.model, **content}

    def _likelihoods(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        return {"content": [_token(token) for token in tokens], "refusal": None} if self.tells_likelihoods else None


def event(content: dict[str, Any]) -> str:
    """An object as a server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def usage(end: Finished) -> dict[str, int]:
    """Tokens that were read, pictures included, and said."""
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
    }


def _token(token: Token) -> dict[str, Any]:
    likely = [_with_bytes(text, logprob) for text, logprob in token.likely]
    return {**_with_bytes(token.text, token.logprob), "top_logprobs": likely}


def _with_bytes(text: str, logprob: float) -> dict[str, Any]:
    """A token and its bytes; those of half a character are not told."""
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
