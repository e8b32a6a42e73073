# SPDX-License-Identifier: Apache-2.0
"""A Jinja chat template with all that its rendering depends on, so that the same messages always give the same text."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from moellava.data.render.own import own_template
from moellava.data.render.volatile import require_steady
from moellava.errors import UserError

Content = str | Sequence[Mapping[str, str]]
"""A message: text, or parts such as `{"type": "image"}` and `{"type": "text", "text": …}`."""

Turns = Sequence[tuple[str, Content]]
"""(role, message) in turn; roles are 'user' and 'assistant', after a 'system' if need be, and an answer is text or one
part of text."""

Span = tuple[int, int]
"""A range of characters (begin, end)."""

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")

_LISTED = "[{'type': 'text', 'text': "
"""How a template begins that prints a list of parts instead of going through it."""

_PRINTED = ("{'type': 'text'", '{"type": "text"')
"""What such a template writes."""


NO_TEMPLATE = (
    "--version chat_template needs a tokenizer with a chat template and this one has none: name one of our "
    "templates instead, or add a chat_template.jinja to its folder"
)


class ChatTemplate:
    """A chat template over the special tokens of its tokenizer.

    Args:
        source: a tokenizer or a processor; its `apply_chat_template` renders.
        chat_template: in Jinja, or several by name.
        in_parts: whether every message is a list of parts.

    Raises:
        UserError: see `require_steady`.
    """

    def __init__(self, source: Any, chat_template: Any, in_parts: bool = False):
        self.source = source
        self.chat_template = own_template(chat_template)
        require_steady(self.chat_template or "")
        self.in_parts = in_parts
        self.added_tokens_decoder = getattr(source, "tokenizer", source).added_tokens_decoder

    @property
    def special(self) -> list[str]:
        """The special tokens, as they are spelled."""
        return [token.content for token in self.added_tokens_decoder.values() if token.special]

    @property
    def is_marked(self) -> bool:
        """Whether it marks answers by `{% generation %}`."""
        return bool(self.chat_template and _MARKED.search(self.chat_template))

    def render_marked(self, turns: Turns) -> tuple[str, list[Span]]:
        """The text of a conversation, and the characters that its template marks as answers; marks that touch each
        other are one. Raises UserError: see `render`."""
        names = getattr(self.source, "tokenizer", self.source).special_tokens_map
        with _named_errors(len(turns)):
            texts, marks = render_jinja_template(
                [self._messages(turns)],
                chat_template=self.chat_template,
                return_assistant_tokens_mask=True,
                **names,
            )
        spans: list[Span] = []
        for begin, end in marks[0]:
            if spans and spans[-1][1] == begin:
                begin = spans.pop()[0]
            if begin < end:
                spans.append((begin, end))
        return texts[0], spans

    def render(self, turns: Turns, opens: bool) -> str:
        """The text of a conversation.

        Args:
            turns: what is said.
            opens: whether what opens the next answer follows.

        Raises:
            UserError: the template cannot render it.
        """
        messages = self._messages(turns)
        apply = functools.partial(
            self.source.apply_chat_template,
            chat_template=self.chat_template,
            add_generation_prompt=opens,
            tokenize=False,
        )
        with _named_errors(len(turns)):
            text = apply(messages)
            if turns[0][0] == "system" and _LISTED in text:
                # Llama 3.2's template wants a system prompt as text, and prints a list as one.
                text = apply([{"role": "system", "content": turns[0][1]}, *messages[1:]])
        return text

    def require_parts(self, text: str) -> None:
        """Raises UserError where a rendering shows that the template prints lists of parts, being one for texts."""
        if self.in_parts and any(listed in text for listed in _PRINTED):
            raise UserError("the chat template prints messages in parts as lists, being one for texts")

    def _messages(self, turns: Turns) -> list[dict[str, Any]]:
        return [{"role": role, "content": self._content(content)} for role, content in turns]

    def _content(self, content: Content) -> Content:
        return [{"type": "text", "text": content}] if self.in_parts and isinstance(content, str) else content


@contextmanager
def _named_errors(messages: int) -> Iterator[None]:
    """Turns what a template raises into a UserError."""
    try:
        yield
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"the chat template cannot render {messages} alternating messages: {error}") from error


def texts_of(content: Content) -> list[str]:
    """The texts of a message, in order."""
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def parting(one: str, other: str) -> str:
    """Where two texts part, for an error message."""
    same = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return (
        f"after {one[max(0, same - 30) : same]!r} one has {one[same : same + 40]!r}, other {other[same : same + 40]!r}"
    )
