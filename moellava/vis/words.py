# SPDX-License-Identifier: Apache-2.0
"""Classes of text tokens, by their letters alone: no dictionary, no language."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

WORD_CLASSES = ("special", "space", "punctuation", "number", "name", "word", "part of a word")
"""What a text token may be; 'name' begins with a capital, 'part of a word' goes on with one."""


def word_classes(texts: Sequence[str], special: Sequence[bool]) -> Iterator[str]:
    """The class of each token of a text.

    Args:
        texts: what each token reads, with the space before it.
        special: whether it is a special token.
    """
    before = " "
    for text, is_special in zip(texts, special, strict=True):
        yield "special" if is_special else word_class(text, before)
        before = " " if is_special else text or before


def word_class(text: str, before: str) -> str:
    """The class of a token that is no special one, behind the text of another."""
    letters = text.strip()
    if not letters:
        return "space"
    if not any(letter.isalnum() for letter in letters):
        return "punctuation"
    if letters.replace(".", "").replace(",", "").isnumeric():
        return "number"
    if text[0] == letters[0] and before[-1:].isalpha() and letters[0].isalpha():
        return "part of a word"
    return "name" if letters[0].isupper() else "word"
