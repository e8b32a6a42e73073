"""Trained spans of a Jinja chat template, found by prefix difference.

A conversation is rendered up to each answer, with the generation prompt, and once more with the answer: what was added
is the answer, from the point where generation would begin, and what ends it. That is sound only if every rendering is a
prefix of the next. A template for which it is not (one that drops earlier reasoning, say, or repeats a message) is
refused, with the place where the renderings part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from moellava.conversation import Origin, Piece
from moellava.errors import DataError, UserError

_EDGE = "\u2003"
"""Whitespace around a stand-in message: a template that strips messages strips it, and no template writes it itself."""

Content = str | Sequence[Mapping[str, str]]
"""A message: text, or parts such as `{"type": "image"}` and `{"type": "text", "text": …}`."""

PartTypes = tuple[str, ...]
"""What the parts of a message are: 'text', 'image', 'video'."""

Turns = Sequence[tuple[str, Content]]
"""(role, message) in turn; roles are 'user' and 'assistant', after a 'system' if need be, and an answer is text or one
part of text."""


class Slot(NamedTuple):
    """Where a text stands in the rendering: a message, or a part of one.

    Attributes:
        before: what the template writes in front of it, placeholders of media included; not trained.
        lead: template text in front of an answer that generation would write, trained.
        ending: what ends an answer, trained; empty for a question.
        keeps_left: whether whitespace on the left of the text is kept.
        keeps_right: whether whitespace on its right is kept.
    """

    before: str
    lead: str
    ending: str
    keeps_left: bool
    keeps_right: bool

    def text_of(self, message: str) -> str:
        """The message as the template writes it."""
        message = message if self.keeps_left else message.lstrip()
        return message if self.keeps_right else message.rstrip()


def chat_pieces(
    tokenizer: PreTrainedTokenizerBase,
    turns: Turns,
    name: str = "the conversation",
    opens: bool = False,
    system: str | None = None,
) -> list[Piece]:
    """A conversation as its tokenizer's chat template renders it, with the trained flags.

    Args:
        tokenizer: has a chat template.
        turns: alternating, the user first.
        name: of the record, for messages.
        opens: whether what opens the next answer follows, the user having the last word.
        system: a system prompt that opens the conversation; None leaves that to the template.

    Raises:
        UserError: no chat template, or one that is not prefix-stable.
        DataError: the template rewrites what this conversation says, or cannot be masked for one of its shape.
    """
    shape = tuple(None if isinstance(content, str) else part_types(content) for _, content in turns)
    if system is not None:
        turns = [("system", system), *turns]
    try:
        slots, after = _structure(tokenizer, tokenizer.chat_template, shape, opens, system is not None)
    except UserError as error:
        raise (DataError if is_sound(tokenizer) else UserError)(f"{name}: {error}") from error
    said = [(role, isinstance(content, str), text) for role, content in turns for text in texts_of(content)]
    pieces = []
    for slot, (role, is_whole, text) in zip(slots, said, strict=True):
        answer = role == "assistant"
        # Where a question comes in parts, its images are parts of their own, and no tag in its texts is one.
        origin = _ORIGINS[role] if is_whole else Origin.ANSWER
        pieces += [
            Piece(slot.before),
            Piece(slot.lead, True),
            Piece(slot.text_of(text), answer, origin),
            Piece(slot.ending, True),
        ]
    pieces = [piece for piece in [*pieces, Piece(after)] if piece.text]
    rendered = _render(tokenizer, turns, opens)
    ours = "".join(piece.text for piece in pieces)
    if rendered != ours:
        raise DataError(f"{name}: the chat template rewrites what is said: {_parting(ours, rendered)}")
    return pieces


_ORIGINS = {"system": Origin.SYSTEM, "user": Origin.QUESTION, "assistant": Origin.ANSWER}


def chat_terminator(tokenizer: PreTrainedTokenizerBase) -> str:
    """What ends an answer in the tokenizer's chat template. Raises UserError: see `chat_pieces`."""
    slots, _ = _structure(tokenizer, tokenizer.chat_template, (None, None), False)
    return slots[1].ending


def is_sound(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a question and its answer can be masked in the tokenizer's chat template."""
    try:
        return bool(chat_terminator(tokenizer))
    except UserError:
        return False


def part_types(parts: Sequence[Mapping[str, str]]) -> PartTypes:
    """The `PartTypes` of a message."""
    return tuple(part["type"] for part in parts)


def texts_of(content: Content) -> list[str]:
    """The texts of a message, in order."""
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def _stand_in(number: str, types: PartTypes | None) -> Content:
    """What stands for a message while the template is examined; parts of the same types."""
    if types is None:
        return f"{_EDGE}Message{number}x{_EDGE}"
    return [
        {"type": name, "text": f"{_EDGE}Message{number}part{part}x{_EDGE}"} if name == "text" else {"type": name}
        for part, name in enumerate(types)
    ]


@lru_cache(maxsize=256)
def _structure(
    tokenizer: PreTrainedTokenizerBase,
    template: Any,
    shape: tuple[PartTypes | None, ...],
    opens: bool,
    has_system: bool = False,
) -> tuple[tuple[Slot, ...], str]:
    """Where the texts of messages stand, and the text after the last one; found with stand-ins for them.

    Args:
        tokenizer: renders.
        template: only tells apart the states of a tokenizer whose template is changed.
        shape: for each message the types of its parts, None for plain text.
        opens: see `chat_pieces`.
        has_system: whether a system prompt opens the conversation.
    """
    if not template:
        raise UserError(
            "--version chat_template needs a tokenizer with a chat template and this one has none: name one of our "
            "templates instead, or add a chat_template.jinja to its folder"
        )
    turns = [("assistant" if n % 2 else "user", _stand_in(str(n), types)) for n, types in enumerate(shape)]
    if has_system:
        turns = [("system", _stand_in("system", None)), *turns]
    whole = _render(tokenizer, turns, opens)
    slots, position = [], 0
    for number, (role, content) in enumerate(turns):
        for text in texts_of(content):
            place, end = _place(whole, text.strip(), position, f"message {number} of {len(turns)}")
            begin, ending = place, ""
            if role == "assistant":
                begin, ending = _around_answer(tokenizer, turns, number, whole, place, end)
            if not position <= begin <= place:
                raise UserError(f"the chat template opens answer {number} elsewhere than where it stands: {whole!r}")
            keeps = whole[place] == _EDGE, whole[end - 1] == _EDGE
            slots.append(Slot(whole[position:begin], whole[begin:place], ending, *keeps))
            position = end + len(ending)
    return tuple(slots), whole[position:]


def _place(whole: str, stand_in: str, position: int, what: str) -> tuple[int, int]:
    """The characters (begin, end) of a stand-in, with the whitespace around it that the template keeps."""
    place = whole.find(stand_in, position)
    if place < 0 or whole.count(stand_in) != 1:
        raise UserError(f"the chat template leaves out, repeats or reorders the texts of messages: {what}")
    end = place + len(stand_in)
    return place - (whole[place - 1 : place] == _EDGE), end + (whole[end : end + 1] == _EDGE)


def _around_answer(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, number: int, whole: str, place: int, end: int
) -> tuple[int, str]:
    """Where generation of answer `number` would begin, and what ends it. Raises UserError if prefixes differ."""
    opening = _difference(whole, _render(tokenizer, turns[:number], True), f"the prompt of answer {number}")
    upto = _render(tokenizer, turns[: number + 1], False)
    _difference(whole, upto, f"the text up to answer {number}")
    return len(opening) if opening else place, _ending(tokenizer, upto[end:])


def _difference(whole: str, prefix: str, what: str) -> str:
    """`prefix`, if the whole rendering begins with it. Raises UserError with the place where they part."""
    if not whole.startswith(prefix):
        raise UserError(
            f"the chat template is not prefix-stable, so that answers cannot be told from the rest: {what} is not the "
            f"beginning of the whole conversation; {_parting(prefix, whole)}"
        )
    return prefix


def _ending(tokenizer: PreTrainedTokenizerBase, tail: str) -> str:
    """What of the text behind an answer ends it: up to its first special token, or else all of it."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = re.search("|".join(map(re.escape, sorted(special, key=len, reverse=True))), tail) if special else None
    ending = tail[: found.end()] if found else tail
    if not ending:
        raise UserError("the chat template ends an answer with nothing: a model trained on it would never stop")
    return ending


def _render(tokenizer: PreTrainedTokenizerBase, turns: Turns, opens: bool) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"the chat template cannot render {len(turns)} alternating messages: {error}") from error


def _parting(one: str, other: str) -> str:
    """Where two texts part, for an error message."""
    same = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return (
        f"after {one[max(0, same - 30) : same]!r} one has {one[same : same + 40]!r}, other {other[same : same + 40]!r}"
    )
