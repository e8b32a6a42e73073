# SPDX-License-Identifier: Apache-2.0
"""What a model is asked: a question or a conversation with its images and videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from moellava.constants import DEFAULT_IMAGE_TOKEN
from moellava.data.records import MODALITIES, tags_of
from moellava.data.video import Video
from moellava.errors import UserError

Picture = str | Path | Image.Image


@dataclass
class Request:
    """One thing to answer.

    Args:
        question: the text of a single turn. Images and videos are put before it, unless it has tags of theirs.
        images: paths or PIL images, in the order of the `<image>` tags.
        messages: instead of `question`, a LLaVA conversation `[{"from": "human"|"gpt", "value": str}, …]` that ends
            with a human turn.
        videos: paths, or frames as `read_video` gives them, in the order of the `<video>` tags.
        system_prompt: in place of the one that the model's template brings.

    Raises:
        UserError: turns that do not alternate, or tags that are not as many as images or videos.
    """

    question: str | None = None
    images: Sequence[Picture] = ()
    messages: Sequence[dict[str, str]] = field(default_factory=list)
    videos: Sequence[str | Path | Video] = ()
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        self._check_types()
        if (self.question is None) == (not self.messages):
            raise UserError("A request has either a question or messages.")
        if self.question is not None:
            question = self.question
            for modality, shown in self._shown().items():
                question = with_tags(question, len(shown), f"<{modality}>")
            self.messages = [{"from": "human", "value": question}]
        roles = [message["from"] for message in self.messages]
        if roles != ["human", "gpt"] * (len(roles) // 2) + ["human"]:
            raise UserError(f"Messages go human, gpt, human … and end with human; these are {', '.join(roles)}.")
        tags = tags_of(self.messages)
        for modality, shown in self._shown().items():
            if tags.count(modality) != len(shown):
                raise UserError(
                    f"The request has {len(shown)} {modality}s but {tags.count(modality)} <{modality}> tags: "
                    f"{self.messages[-1]['value'][:80]!r}"
                )

    def _check_types(self) -> None:
        """Raises UserError for what is no text, no list of turns, or no list of files; and for half a character."""
        for name, shown, types in (
            ("images", self.images, (str, Path, Image.Image)),
            ("videos", self.videos, (str, Path, Video)),
        ):
            if not isinstance(shown, list | tuple) or not all(isinstance(one, types) for one in shown):
                raise UserError(f"A request's {name} are a list of paths, or of what was opened; this is {shown!r:.80}")
        turns = self.messages
        if not isinstance(turns, list | tuple) or not all(
            isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)
            for turn in turns
        ):
            raise UserError(f"A request's messages are a list of turns with 'from' and 'value'; this is {turns!r:.80}")
        for text in (self.question, self.system_prompt, *(turn["value"] for turn in turns)):
            if text is not None and not isinstance(text, str):
                raise UserError(f"A request's question and system prompt are texts; this is {text!r:.80}")
            if text and not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise UserError(f"The text {text[:80]!a} holds half a character: it is no UTF-8.")

    @property
    def record(self) -> dict[str, Any]:
        """The request as a record, whose answer is missing."""
        system = {} if self.system_prompt is None else {"system_prompt": self.system_prompt}
        shown = {modality: list(media) for modality, media in self._shown().items()}
        return {"conversations": list(self.messages), **shown, **system}

    def _shown(self) -> dict[str, Sequence[Any]]:
        return dict(zip(MODALITIES, (self.images, self.videos), strict=True))


def with_tags(question: str, count: int, tag: str = DEFAULT_IMAGE_TOKEN) -> str:
    """A question with one tag per image (or video) in front, unless it says itself where they stand."""
    if count == 0 or tag in question:
        return question
    return f"{tag}\n" * count + question
