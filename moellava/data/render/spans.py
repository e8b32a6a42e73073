# SPDX-License-Identifier: Apache-2.0
"""Trained spans of a Jinja chat template, found by prefix difference.

A conversation is rendered up to each answer, with the generation prompt, and once more with the answer: what was added
is the answer, from the point where generation would begin, and what ends it. That is sound only if every rendering is a
prefix of the next. Where it is not, because a template drops earlier reasoning, say, each answer is rendered with its
own history (`history.py`); a template that repeats or loses messages is refused, with the place where renderings part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from moellava.conversation import Origin, Piece
from moellava.data.render.chat_template import NO_TEMPLATE, ChatTemplate, Content, Turns, parting, texts_of
from moellava.data.render.history import last_answer_pieces, marked_pieces
from moellava.data.render.renderer import AnswersApartError, only_last
from moellava.errors import DataError, UserError

_EDGE = "\u2003"
"""Whitespace around a stand-in message: a template that strips messages strips it, and no template writes it itself."""

PartTypes = tuple[str, ...]
"""What the parts of a message are: 'text', 'image', 'video'."""


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
    template: ChatTemplate,
    turns: Turns,
    name: str = "the conversation",
    opens: bool = False,
    system: str | None = None,
    last_only: bool = False,
) -> list[Piece]:
    """A conversation as its chat template renders it, with the trained flags.

    Args:
        template: renders.
        turns: alternating, the user first.
        name: of the record, for messages.
        opens: whether what opens the next answer follows, the user having the last word.
        system: a system prompt that opens the conversation; None leaves that to the template.
        last_only: whether the last answer alone is trained, with the history that it has when it is given.

    Raises:
        UserError: no chat template, or one that cannot be masked.
        AnswersApartError: the template rewrites earlier turns, so that each answer has a history of its own.
        DataError: the template rewrites what this conversation says, or cannot be masked for one of its shape.
    """
    shape = tuple(None if isinstance(content, str) else part_types(content) for _, content in turns)
    said = turns if system is None else [("system", system), *turns]
    try:
        if template.is_marked and not opens:
            chat_terminator(template)  # an answer that nothing ends is no answer to learn
            pieces = marked_pieces(template, said)
        else:
            pieces = _framed(template, said, shape, opens, system is not None)
    except UserError as error:
        if not is_sound(template):
            raise UserError(f"{name}: {error}") from error
        pieces = _apart(template, said, name, opens, last_only, error)
    return only_last(pieces) if last_only else pieces


def _framed(
    template: ChatTemplate, turns: Turns, shape: tuple[PartTypes | None, ...], opens: bool, has_system: bool
) -> list[Piece]:
    """A conversation whose texts the template only sets in a frame. Raises UserError where it does more."""
    slots, after, unwritten = _structure(template, shape, opens, has_system)
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
    rendered, ours = template.render(turns, opens) + unwritten, "".join(piece.text for piece in pieces)
    if rendered != ours:
        raise UserError(f"the chat template rewrites what is said: {parting(ours, rendered)}")
    return pieces


def _apart(
    template: ChatTemplate, turns: Turns, name: str, opens: bool, last_only: bool, reason: UserError
) -> list[Piece]:
    """A conversation whose template does more than set its texts in a frame, up to its last answer.

    Args:
        reason: why the whole conversation cannot be had in one text.
    """
    try:
        if template.is_marked and not opens:
            pieces = marked_pieces(template, turns, last_only=True)
        else:
            _, after, unwritten = _structure(template, (None, None), False)
            pieces = last_answer_pieces(template, turns, opens, after, unwritten)
    except UserError as error:
        raise DataError(f"{name}: {error}") from error
    if opens or last_only or sum(role == "assistant" for role, _ in turns) == 1:
        return pieces
    raise AnswersApartError(f"{name}: {reason}")


_ORIGINS = {"system": Origin.SYSTEM, "user": Origin.QUESTION, "assistant": Origin.ANSWER}


@lru_cache(maxsize=64)
def chat_terminator(template: ChatTemplate) -> str:
    """What ends an answer in a chat template. Raises UserError: see `chat_pieces`."""
    if template.is_marked:
        question, answer = (str(_stand_in(number, None)) for number in ("0", "1"))
        pieces = marked_pieces(template, [("user", question), ("assistant", answer)])
        template.require_parts("".join(piece.text for piece in pieces))
        trained = "".join(piece.text for piece in pieces if piece.trained)
        ending = _ending(template, trained.partition(answer.strip())[2].removeprefix(_EDGE))
        if not ending:
            raise UserError("the chat template marks answers without what ends them: a model would never stop")
        return ending
    return _structure(template, (None, None), False)[0][1].ending


def is_sound(template: ChatTemplate) -> bool:
    """Whether a question and its answer can be masked in a chat template."""
    try:
        return bool(chat_terminator(template))
    except UserError:
        return False


def part_types(parts: Sequence[Mapping[str, str]]) -> PartTypes:
    """The `PartTypes` of a message."""
    return tuple(part["type"] for part in parts)


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
    template: ChatTemplate,
    shape: tuple[PartTypes | None, ...],
    opens: bool,
    has_system: bool = False,
) -> tuple[tuple[Slot, ...], str, str]:
    """Where the texts of messages stand, and the text after the last one; found with stand-ins for them. Third, what
    ends the last answer without being in the text (see `_closing`), mostly nothing.

    Args:
        template: renders.
        shape: for each message the types of its parts, None for plain text.
        opens: see `chat_pieces`.
        has_system: whether a system prompt opens the conversation.
    """
    if not template.chat_template:
        raise UserError(NO_TEMPLATE)
    turns = [("assistant" if n % 2 else "user", _stand_in(str(n), types)) for n, types in enumerate(shape)]
    if has_system:
        turns = [("system", _stand_in("system", None)), *turns]
    whole = template.render(turns, opens)
    template.require_parts(whole)
    slots, position, unwritten = [], 0, ""
    for number, (role, content) in enumerate(turns):
        for text in texts_of(content):
            place, end = _place(whole, text.strip(), position, f"message {number} of {len(turns)}")
            begin, ending = place, ""
            if role == "assistant":
                begin, ending = _around_answer(template, turns, number, whole, place, end)
            if not position <= begin <= place:
                raise UserError(f"the chat template opens answer {number} elsewhere than where it stands: {whole!r}")
            keeps = whole[place] == _EDGE, whole[end - 1] == _EDGE
            slots.append(Slot(whole[position:begin], whole[begin:place], ending, *keeps))
            unwritten = "" if whole.startswith(ending, end) else ending
            position = end + len(ending) - len(unwritten)
    return tuple(slots), whole[position:], unwritten


def _place(whole: str, stand_in: str, position: int, what: str) -> tuple[int, int]:
    """The characters (begin, end) of a stand-in, with the whitespace around it that the template keeps."""
    place = whole.find(stand_in, position)
    if place < 0 or whole.count(stand_in) != 1:
        raise UserError(f"the chat template leaves out, repeats or reorders the texts of messages: {what}")
    end = place + len(stand_in)
    return place - (whole[place - 1 : place] == _EDGE), end + (whole[end : end + 1] == _EDGE)


def _around_answer(
    template: ChatTemplate, turns: Turns, number: int, whole: str, place: int, end: int
) -> tuple[int, str]:
    """Where generation of answer `number` would begin, and what ends it. Raises UserError if prefixes differ."""
    opening = _difference(whole, template.render(turns[:number], True), f"the prompt of answer {number}")
    upto = template.render(turns[: number + 1], False)
    _difference(whole, upto, f"the text up to answer {number}")
    return len(opening) if opening else place, _ending(template, upto[end:]) or _closing(template)


def _difference(whole: str, prefix: str, what: str) -> str:
    """`prefix`, if the whole rendering begins with it. Raises UserError with the place where they part."""
    if not whole.startswith(prefix):
        raise UserError(
            f"the chat template is not prefix-stable, so that answers cannot be told from the rest: {what} is not the "
            f"beginning of the whole conversation; {parting(prefix, whole)}. A variant of it that sets answers between "
            "{% generation %} and {% endgeneration %} says itself what is trained"
        )
    return prefix


def _ending(template: ChatTemplate, tail: str) -> str:
    """What of the text behind an answer ends it: up to its first special token, or else all of it."""
    found = _first_special(template, tail)
    return tail[: found.end()] if found else tail


def _closing(template: ChatTemplate) -> str:
    """The special token that opens a question, and so ends the answer before it, where a template ends an answer with
    nothing (GLM's: generation stops at `<|user|>`). Raises UserError where there is none either."""
    asked, said, more = (str(_stand_in(number, None)) for number in "012")
    whole = template.render([("user", asked), ("assistant", said), ("user", more)], False)
    between = whole.partition(said.strip())[2].partition(more.strip())[0].removeprefix(_EDGE)
    found = _first_special(template, between)
    if found is None:
        raise UserError("the chat template ends an answer with nothing: a model trained on it would never stop")
    return between[: found.end()]


def _first_special(template: ChatTemplate, text: str) -> re.Match[str] | None:
    """Where a text spells its first special token."""
    special = sorted(template.special, key=len, reverse=True)
    return re.search("|".join(map(re.escape, special)), text) if special else None
