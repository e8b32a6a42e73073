# SPDX-License-Identifier: Apache-2.0
"""Which option an answer to a multiple-choice question means."""

from __future__ import annotations

import re
from collections.abc import Mapping

LETTERS = "ABCDEFGHIJ"

_LEAD = re.compile(r"\(?([A-J])\)?(?:[.:,)\s]|\Z)")
_NAMED = re.compile(r"\b(?:answer|option|choice)\b(?: is|:)? *\(?([A-J])\b", re.IGNORECASE)
_STATED = re.compile(r"The answer is ([A-Z])\.")


def letter_of(said: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that is meant; None where none is, or more than one.

    Read as a letter alone or in front ('B', 'B.', '(B)', 'B: a dog'), as one that is named ('The answer is B'), or as
    the text of an option. The published scripts ask a language model where they find less; that is not done here.

    Args:
        said: the answer.
        options: letter -> text of the options that there are.
    """
    said = said.strip()
    by_text = [
        letter for letter, text in options.items() if said.rstrip(".").lower() == text.strip().rstrip(".").lower()
    ]
    lead = _LEAD.match(said)
    # 'A dog' begins with an article, unless the letter stands apart from the words.
    if lead and lead[1] in options and (lead[1] != "A" or said[lead.end(1) : lead.end()] != " "):
        return lead[1]
    if len(by_text) == 1:
        return by_text[0]
    named = {letter.upper() for letter in _NAMED.findall(said)} & set(options)
    return named.pop() if len(named) == 1 else None


def scienceqa_letter(said: str, letters: str) -> str | None:
    """As LLaVA's script for ScienceQA reads an answer: 'B', 'B. …', or one 'The answer is B.'; else None.

    Args:
        said: the answer.
        letters: those of the options that there are.
    """
    if said and said in letters and len(said) == 1:
        return said
    if said[:1] in tuple(letters) and said[1:3] == ". ":
        return said[0]
    stated = _STATED.findall(said)
    return stated[0] if len(stated) == 1 and stated[0] in letters else None
