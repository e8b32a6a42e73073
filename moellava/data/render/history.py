# SPDX-License-Identifier: Apache-2.0
"""Answers rendered with the real texts of a conversation, for chat templates that do more than set them in a frame.

Many templates rewrite earlier turns: they drop the reasoning of all answers but the last, or write an empty one in
front of the last alone (Qwen 3, GLM, gpt-oss, DeepSeek). No text then holds every answer as the model gives it, so each
answer is rendered with its own history, as the model reads it when it answers:

    prompt    the conversation up to the answer, with what opens the next one      not trained
    whole     the same with the answer; it begins with the prompt                  the rest is trained

A template that marks answers (`{% generation %}`) says itself what is trained, in one text for all of them.

Special tokens and media tags that were typed are sealed while the template renders: a noncharacter inside of them keeps
them from being taken for the template's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from moellava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN
from moellava.conversation import Origin, Piece
from moellava.data.render.chat_template import ChatTemplate, Content, Turns, parting, texts_of
from moellava.errors import DataError

_NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
"""Code points that no text has (Unicode's noncharacters)."""


class Seals:
    """Keeps what was typed apart from what a template writes.

    Args:
        tokens: what is a token where a template writes it, and text where it was typed.
        texts: the messages.

    Raises:
        DataError: the messages hold every noncharacter there is.
    """

    def __init__(self, tokens: Iterable[str], texts: Iterable[str]):
        used = set("".join(texts))
        free = [char for char in _NONCHARACTERS if char not in used]
        if len(free) < 2:
            raise DataError("its texts hold all of Unicode's noncharacters U+FDD0 to U+FDEF: take them out")
        self._typed, self._placed = free[:2]
        spelled = sorted({*tokens, DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN}, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, spelled)))
        tag = re.escape(self._broken(DEFAULT_IMAGE_TOKEN, self._placed))
        broken = "|".join(re.escape(self._broken(text, self._typed)) for text in spelled)
        self._sealed = re.compile(f"({tag}|{broken})")

    @staticmethod
    def _broken(text: str, mark: str) -> str:
        return text[0] + mark + text[1:]

    def seal(self, role: str, content: Content) -> Content:
        """A message that spells no token any more; the image tags of a question stay known as such."""
        if isinstance(content, str):
            mark = self._placed if role == "user" else self._typed
            return self._tokens.sub(lambda found: self._broken(found[0], self._mark_of(found[0], mark)), content)
        return [
            {**part, "text": self._tokens.sub(lambda found: self._broken(found[0], self._typed), part["text"])}
            if part["type"] == "text"
            else part
            for part in content
        ]

    def _mark_of(self, token: str, mark: str) -> str:
        return mark if token == DEFAULT_IMAGE_TOKEN else self._typed

    def opened(self, text: str) -> str:
        """The text as it was typed."""
        return text.replace(self._typed, "").replace(self._placed, "")

    def pieces(self, text: str, trained: bool) -> list[Piece]:
        """A stretch of a rendering in pieces: what was typed and looks like a token is plain text."""
        found = []
        for number, part in enumerate(self._sealed.split(text)):
            origin = Origin.TEMPLATE
            if number % 2:
                origin = Origin.QUESTION if self._placed in part else Origin.ANSWER
            if self.opened(part) != part and not number % 2:
                raise DataError("the chat template takes apart what looks like a special token in a message")
            found.append(Piece(self.opened(part), trained, origin))
        return [piece for piece in found if piece.text]


def last_answer_pieces(template: ChatTemplate, turns: Turns, opens: bool, after: str, unwritten: str) -> list[Piece]:
    """A conversation whose last answer alone is trained, or none of its answers where what opens the next follows.

    Args:
        template: renders.
        turns: what is said; the last one answers, or asks where `opens`.
        opens: whether what opens the next answer follows.
        after: what stands behind what ends an answer.
        unwritten: what ends an answer without being in the text.

    Raises:
        DataError: the answer does not go on from its prompt, or something of it or of a question is left out.
    """
    seals, sealed = _sealed(template, turns)
    asked = sealed if opens else sealed[:-1]
    prompt = template.render(asked, True)
    _require_in_order([text for role, text in _said(turns) if role != "assistant"], seals.opened(prompt))
    if opens:
        return seals.pieces(prompt, False)
    whole = template.render(sealed, False)
    if not whole.startswith(prompt):
        raise DataError(
            "the chat template opens an answer otherwise when it is asked for than when it is there; "
            f"{parting(seals.opened(prompt), seals.opened(whole))}"
        )
    end = len(whole) - len(after)
    if not whole.endswith(after) or end <= len(prompt):
        raise DataError(f"the chat template ends this answer otherwise than others: {seals.opened(whole[-40:])!r}")
    # A prompt may open the answer with its own first word, <think> for one.
    opening = len(prompt.rstrip()) - len(prompt.split()[-1]) if prompt.split() else 0
    _require(_said(turns)[-1][1], seals.opened(whole[opening:end]), "the answer")
    answer = whole[len(prompt) : end] + unwritten
    return [*seals.pieces(prompt, False), *seals.pieces(answer, True), *seals.pieces(after, False)]


def marked_pieces(template: ChatTemplate, turns: Turns, last_only: bool = False) -> list[Piece]:
    """A conversation in one text, trained where its template marks answers.

    Args:
        template: renders, and has marks.
        turns: what is said.
        last_only: whether the last answer alone is trained, and those before it may be shortened.

    Raises:
        DataError: other marks than answers, or something of an answer or a question is left out.
    """
    seals, sealed = _sealed(template, turns)
    text, spans = template.render_marked(sealed)
    answers = [text for role, text in _said(turns) if role == "assistant"]
    if len(spans) != len(answers):
        raise DataError(f"the chat template marks {len(spans)} answers of {len(answers)} by {{% generation %}}")
    pieces: list[Piece] = []
    position = 0
    for number, ((begin, end), answer) in enumerate(zip(spans, answers, strict=True), start=1):
        trained = not last_only or number == len(answers)
        if trained:
            _require(answer, seals.opened(text[begin:end]), "an answer")
        pieces += [*seals.pieces(text[position:begin], False), *seals.pieces(text[begin:end], trained)]
        position = end
    pieces += seals.pieces(text[position:], False)
    _require_in_order([said for role, said in _said(turns) if role != "assistant"], seals.opened(text))
    return pieces


def _sealed(template: ChatTemplate, turns: Turns) -> tuple[Seals, list[tuple[str, Content]]]:
    seals = Seals(template.special, (text for _, content in turns for text in texts_of(content)))
    return seals, [(role, seals.seal(role, content)) for role, content in turns]


def _said(turns: Turns) -> list[tuple[str, str]]:
    return [(role, "".join(texts_of(content))) for role, content in turns]


def _require(said: str, text: str, what: str) -> None:
    """Raises DataError unless a text holds what was said, up to white space."""
    if _bare(said) not in _bare(text):
        raise DataError(f"the chat template rewrites {what}: {said[:80]!r} is not in {text[-160:]!r}")


def _require_in_order(said: Sequence[str], text: str) -> None:
    """Raises DataError unless a text holds all that was said, in order and up to white space."""
    rest, position = _bare(text), 0
    for words in said:
        place = rest.find(_bare(words), position)
        if place < 0:
            raise DataError(f"the chat template leaves out, rewrites or reorders a message: {words[:80]!r}")
        position = place + len(_bare(words))


def _bare(text: str) -> str:
    """A text without white space, which templates set as they like."""
    return "".join(text.split())
