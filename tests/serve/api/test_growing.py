# SPDX-License-Identifier: Apache-2.0
"""Texts that grow: what is certain, and what stops them."""

from __future__ import annotations

import pytest
import torch

from moellava.data.tokenizers import load_tokenizer
from moellava.serve.api.growing import Growing, Piece
from moellava.serve.ending import Ending


@pytest.fixture(scope="module")
def two(golden_tokenizers) -> list:
    """A tokenizer of bytes, and one that spells bytes by tokens and drops spaces at a text's beginning."""
    return [load_tokenizer(golden_tokenizers / name) for name in ("phi", "mistral")]


def grown(tokenizer, text: str, stops: tuple[str, ...] = (), limit: int = 99, likely: int | None = None):
    """The pieces of a text that is said token by token, and the row."""
    told: list[Piece] = []
    row = Growing(Ending(tokenizer, "", None), stops, limit, likely, told.append, lambda: False)
    logprob_V = torch.linspace(-9, -1, len(tokenizer))
    for token in [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]:
        if row.take(token, None if likely is None else logprob_V):
            break
    return told, row


def test_pieces_join_to_the_text(two):
    for tokenizer in two:
        told, row = grown(tokenizer, "Ein Küchenmesser 🍴, für 3 €.")
        assert "".join(piece.text for piece in told) == "Ein Küchenmesser 🍴, für 3 €."
        assert row.reason == "stop" and len(told) > 4
        assert not any("\ufffd" in piece.text for piece in told)


def test_what_may_become_a_stop_is_held_back(two):
    told, row = grown(two[0], "one two\n\nUSER said three", stops=("USER:", "\n\nUSER said"))
    assert "".join(piece.text for piece in told) == "one two"
    assert row.reason == "stop" and len(row.ids) < 9
    told, row = grown(two[0], "one two USER said three", stops=("USER:",))
    assert "".join(piece.text for piece in told) == "one two USER said three"


def test_a_length_ends_a_text(two):
    told, row = grown(two[0], "one two three four", limit=2)
    assert "".join(piece.text for piece in told) == "one two"
    assert row.reason == "length" and len(row.ids) == 2


def test_tokens_are_spelled_as_they_stand_in_the_text(two):
    for tokenizer in two:
        told, _ = grown(tokenizer, "one two three stop four", stops=("stop",), likely=2)
        tokens = [token for piece in told for token in piece.tokens]
        assert "".join(token.text for token in tokens).strip() == "one two three"
        assert all(len(token.likely) == 2 and token.likely[0][1] == -1 for token in tokens)
