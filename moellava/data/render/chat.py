# SPDX-License-Identifier: Apache-2.0
"""A Jinja chat template as a renderer (`--version chat_template`).

Its messages are texts, with media tags in them, or lists of parts, media and texts. `spans.py` renders the conversation
with stand-ins for its texts, which shows where the template puts media, and the real texts then take their places:

    question  <image>\\nWhat is it?               parts   image, "What is it?"
    rendered  USER: <image>\\n|·Message0part1x·   pieces  USER: <image>\\n (the template's), What is it? (plain text)

Where a template rewrites what is said, `history.py` renders the real texts instead. So special tokens and placeholders
exist only where the template writes them; typed in a message, they are text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from moellava.constants import CHAT_TEMPLATE
from moellava.conversation import Origin, Piece
from moellava.data.records import MEDIA_TAG, Source
from moellava.data.render.chat_template import ChatTemplate, Content
from moellava.data.render.renderer import Renderer, turns_of
from moellava.data.render.spans import chat_pieces, chat_terminator, is_sound
from moellava.log import get_logger

Part = tuple[str, str]
"""('text', the text), ('image', '') or ('video', '')."""


class ChatRenderer(Renderer):
    """The chat template of a tokenizer, over texts, or of a processor, over lists of parts.

    Args:
        source: a tokenizer or a processor; its `apply_chat_template` renders.
        template: in Jinja; None: the source's own.
        in_parts: whether messages are lists of parts.
    """

    version = CHAT_TEMPLATE

    def __init__(self, source: Any, template: str | None = None, in_parts: bool = False):
        self.source = source
        self._rendered_by = settled(source, source.chat_template if template is None else template, in_parts)
        self.template = self._rendered_by.chat_template
        self.in_parts = in_parts
        self.keeps_tags = not in_parts
        self.shows_videos = in_parts

    @property
    def terminator(self) -> str:
        return chat_terminator(self._rendered_by)

    @property
    def ends_with_special_token(self) -> bool:
        """Whether an answer ends with a special token, without which generation would not stop. Raises UserError where
        the template cannot be masked."""
        ending = self.terminator
        return any(token in ending for token in self._rendered_by.special)

    def pieces(
        self,
        source: Source,
        *,
        has_media: bool,
        name: str = "the conversation",
        opens: bool = False,
        system: str | None = None,
        last_only: bool = False,
    ) -> list[Piece]:
        said = turns_of(source, name)
        turns: Sequence[tuple[str, Content]] = said
        if self.in_parts:
            turns = [(role, text if role != "user" else message_in_parts(text, has_media)) for role, text in said]
        pieces = chat_pieces(self._rendered_by, turns, name, opens, system, last_only)
        numbered = getattr(self.source, "numbered", None)
        return [self._unnumbered(piece, numbered) for piece in pieces] if numbered else pieces

    def _unnumbered(self, piece: Piece, numbered: Any) -> Piece:
        """A piece whose placeholders, where the template writes them with a number each, are the processor's one."""
        if piece.origin is not Origin.TEMPLATE:
            return piece
        return piece._replace(text=numbered.sub(self.source.image_token, piece.text))


def settled(source: Any, template: Any, in_parts: bool) -> ChatTemplate:
    """A chat template as it is trained on: without the reasoning that prompts would open and plain answers lack, where
    answers otherwise do not go on from their prompts (Nemotron's, DeepSeek's)."""
    found = ChatTemplate(source, template, in_parts)
    text = found.chat_template or ""
    if is_sound(found):
        return found
    for changed in without_reasoning(text):
        quiet = ChatTemplate(source, changed, in_parts)
        if is_sound(quiet):
            _say_once(text)
            return quiet
    return found


def without_reasoning(template: str) -> list[str]:
    """Ways to keep a chat template from opening a reasoning in its prompts: the switch that it has for that, or taking
    out what opens it."""
    off = "".join(f"{{%- set {name} = false %}}\n" for name in SWITCHES if re.search(rf"\b{name}\b", template))
    before, prompt, behind = template.rpartition("add_generation_prompt")
    unopened = before + prompt + _OPENER.sub("", behind)
    return [changed for changed in (f"{off}{template}", unopened) if changed != template]


SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates let reasoning be switched off."""

_OPENER = re.compile(r"<think>(\\n|\n)?")


@functools.lru_cache(maxsize=64)
def _say_once(template: str) -> None:
    get_logger(__name__).info(
        "The chat template opens a reasoning in its prompts, which its answers here do not go on with: it is trained, "
        "asked and saved without that."
    )


def _part(name: str, text: str) -> dict[str, str]:
    return {"type": name, "text": text} if name == "text" else {"type": name}


def message_in_parts(text: str, has_media: bool) -> list[dict[str, str]]:
    """A human message as a chat template takes it."""
    return [_part(*part) for part in parts_of_text(text, has_media)]


def parts_of_text(text: str, has_media: bool) -> list[Part]:
    """A human message in parts: the media tags apart, and between them what was typed, to the last space.

    Only the line break of LLaVA's own layout goes, with which it sets off images, as a template does in its own way:
    one behind each tag of those that open a message (`<image>\\n`), and one in front of those that end it.

    Args:
        text: of the record.
        has_media: whether the record has media; otherwise tags are text.
    """
    if not has_media:
        return [("text", text)]
    pieces = MEDIA_TAG.split(text)
    texts, tags = pieces[::2], pieces[1::2]
    opening = 0
    while opening < len(tags) and not texts[opening]:
        opening += 1
        texts[opening] = texts[opening].removeprefix("\n")
    last = len(tags)
    while last > 0 and not texts[last]:
        last -= 1
    if last < len(tags) and texts[last] != "\n":
        texts[last] = texts[last].removesuffix("\n")
    parts: list[Part] = [("text", texts[0])]
    for tag, typed in zip(tags, texts[1:], strict=True):
        parts += [(tag, ""), ("text", typed)]
    return [part for part in parts if part != ("text", "")] or [("text", "")]
