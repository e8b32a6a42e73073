# SPDX-License-Identifier: Apache-2.0
"""What every renderer has: a name, pieces of a conversation, and what ends an answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from moellava.conversation import Piece
from moellava.data.records import ROLES, Source, problem_of_turns
from moellava.errors import DataError


class AnswersApartError(DataError):
    """A template rewrites earlier turns: each answer is rendered with the history that it has when it is given, and is
    an example of its own."""


class Renderer(ABC):
    """Turns a conversation into pieces.

    Attributes:
        version: the name that `--version` knows it by.
        keeps_tags: whether media tags stay in questions, where the mask engine puts placeholders for them. Otherwise
            the template writes the model's own placeholders, which the media reader knows.
        shows_videos: whether it has a way to show a video; otherwise a video is its frames.
    """

    version: str
    keeps_tags: bool
    shows_videos: bool

    @abstractmethod
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
        """A conversation, rendered.

        Args:
            source: turns; a leading answer without a question is left out, as LLaVA does.
            has_media: whether media tags in questions stand for media; else they are text.
            name: of the record, for messages.
            opens: whether what opens the next answer follows, the user having the last word.
            system: a system prompt in place of the template's own.
            last_only: whether the last answer alone is trained.

        Raises:
            AnswersApartError: the template has no one text for all answers; with `last_only` it has one.
            DataError: turns that cannot be rendered.
            UserError: a template that cannot be masked.
        """

    def texts(
        self, source: Source, *, has_media: bool, name: str = "the conversation", system: str | None = None
    ) -> list[tuple[list[Piece], range]]:
        """All that a conversation trains: its pieces, or one rendering for each answer where the template rewrites
        earlier turns; with the numbers of the answers that each of them trains. Raises: see `pieces`."""
        answers = len(turns_of(source, name)) // 2
        try:
            return [(self.pieces(source, has_media=has_media, name=name, system=system), range(answers))]
        except AnswersApartError:
            return [
                (
                    self.pieces(up_to(source, n), has_media=has_media, name=name, system=system, last_only=True),
                    range(n, n + 1),
                )
                for n in range(answers)
            ]

    @property
    @abstractmethod
    def terminator(self) -> str:
        """What ends an answer, hence what stops generation. Raises UserError where the template cannot be masked."""

    def places_media(self, has_media: bool) -> bool:
        """Whether media tags of a question are placeholders, in a record that has media or has none."""
        return has_media

    def problem(self, record: dict[str, Any]) -> str | None:
        """What a sound record lacks for this template, as the end of a sentence; None if nothing."""
        return None


def turns_of(source: Source, name: str = "the conversation") -> list[tuple[str, str]]:
    """A conversation as (role, text), roles being 'user' and 'assistant'.

    Raises:
        DataError: no turns, unknown roles, or roles that do not alternate.
    """
    problem = problem_of_turns(source)
    if problem:
        raise DataError(f"{name} {problem}")
    turns = source[1:] if source[0]["from"] == ROLES[1] else source
    return [("user" if turn["from"] == ROLES[0] else "assistant", turn["value"]) for turn in turns]


def up_to(source: Source, answer: int) -> Source:
    """A conversation that ends with one of its answers, counted from 0."""
    leading = source[0]["from"] == ROLES[1]
    return source[: leading + 2 * (answer + 1)]


def only_last(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces of which the last unbroken run of trained ones alone is trained."""
    kept = list(pieces)
    end = next((n for n in range(len(kept), 0, -1) if kept[n - 1].trained), 0)
    begin = next((n for n in range(end, 0, -1) if not kept[n - 1].trained), 0)
    return [piece._replace(trained=begin <= n < end) for n, piece in enumerate(kept)]
