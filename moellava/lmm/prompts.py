"""A record as its model's chat template renders it: pieces of text, media placeholders, and what is trained.

A question is a list of parts, media and texts. `data/render/chat.py` renders the conversation with stand-ins for its
texts, which shows where the template puts images, and the real texts then take their places:

    question  <image>\\nWhat is it?               parts   image, "What is it?"
    rendered  USER: <image>\\n|·Message0part1x·   pieces  USER: <image>\\n (the template's), What is it? (plain text)

So special tokens and placeholders exist only where the template writes them; typed in a message, they are text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from moellava.conversation import Kind, Piece
from moellava.data.records import MEDIA_TAG
from moellava.data.render.spans import Content, chat_pieces, chat_terminator
from moellava.errors import DataError

Part = tuple[str, str]
"""('text', the text), ('image', '') or ('video', '')."""


class ChatTemplate:
    """A chat template over messages with media, as `chat_spans` wants it: with the methods of a tokenizer.

    Args:
        processor: renders it.
        template: in Jinja.
        system: a system prompt that opens every conversation; None leaves that to the template.
    """

    def __init__(self, processor: Any, template: str, system: str | None = None):
        self.processor = processor
        self.chat_template = template
        self.system = system
        self.added_tokens_decoder = processor.tokenizer.added_tokens_decoder

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], tokenize: bool = False, add_generation_prompt: bool = False
    ) -> str:
        """Text of messages whose content is a string or a list of parts.

        Raises:
            ValueError: the template cannot render them.
        """
        turns = [{"role": turn["role"], "content": _content(turn["content"])} for turn in messages]
        render = functools.partial(
            self.processor.apply_chat_template,
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=tokenize,
        )
        if self.system is None:
            return render(turns)
        rendered = render([{"role": "system", "content": _content(self.system)}, *turns])
        if _LISTED in rendered:  # Llama 3.2's template wants a system prompt as text, and would print a list as one
            rendered = render([{"role": "system", "content": self.system}, *turns])
        return rendered


_LISTED = "[{'type': 'text', 'text': "
"""How a template begins that prints a list of parts instead of going through it."""


def _content(content: Any) -> list[dict[str, str]]:
    return [_part("text", content)] if isinstance(content, str) else content


def _part(kind: str, text: str) -> dict[str, str]:
    return {"type": kind, "text": text} if kind == "text" else {"type": kind}


def parts_of_text(text: str, has_media: bool) -> list[Part]:
    """A human message in parts: the media tags apart, with the line breaks that only set them off removed.

    Args:
        text: of the record.
        has_media: whether the record has media; otherwise tags are text.
    """
    if not has_media:
        return [("text", text)] if text else []
    parts: list[Part] = []
    pieces = MEDIA_TAG.split(text)
    for number, piece in enumerate(pieces):
        if number % 2:
            parts.append((piece, ""))
            continue
        piece = piece.lstrip("\n") if number else piece
        piece = piece.rstrip("\n") if number < len(pieces) - 1 else piece
        if piece.strip():
            parts.append(("text", piece))
    return parts


def prompt_pieces(
    template: ChatTemplate, turns: Sequence[tuple[str, str]], has_media: bool, name: str, opens: bool = False
) -> list[Piece]:
    """A conversation with media as its template renders it.

    Args:
        template: the model's.
        turns: (role, text), alternating, 'user' first; media tags in questions.
        has_media: whether the record has images or videos.
        name: of the record, for messages.
        opens: whether what opens the next answer follows, the user having the last word.

    Raises:
        UserError: the template cannot be masked; the message says where.
        DataError: it rewrites what this conversation says.
    """
    messages: list[tuple[str, Content]] = []
    for role, text in turns:
        if role != "user":
            messages.append((role, text))
            continue
        parts = parts_of_text(text, has_media)
        if not parts:
            raise DataError(f"{name} has a question that says nothing and shows nothing")
        messages.append((role, [_part(*part) for part in parts]))
    pieces = chat_pieces(template, messages, name, opens)
    numbered = getattr(template.processor, "numbered", None)
    return [_unnumbered(piece, numbered, template.processor.image_token) for piece in pieces] if numbered else pieces


def _unnumbered(piece: Piece, numbered: re.Pattern[str], placeholder: str) -> Piece:
    """A piece whose placeholders, if the template writes them with a number each, are the processor's one."""
    return piece._replace(text=numbered.sub(placeholder, piece.text)) if piece.kind is Kind.TEMPLATE else piece


def ends_answers(template: ChatTemplate) -> bool:
    """Whether answers end with a special token, without which generation would not stop. Raises UserError if the
    template cannot be masked."""
    ending = chat_terminator(template)
    return any(token.special and token.content in ending for token in template.added_tokens_decoder.values())
