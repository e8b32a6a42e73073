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
        if (self.question is None) == (not self.messages):
            raise UserError("A request has either a question or messages.")
        if self.question is not None:
            question = self.question
            for modality, shown in self._shown().items():
                question = with_tags(question, len(shown), f"<{modality}>")
            self.messages = [{"from": "human", "value": question}]
        for message in self.messages:
            if not message["value"].isascii() and any("\ud800" <= letter <= "\udfff" for letter in message["value"]):
                raise UserError(f"The text {message['value'][:80]!a} holds half a character: it is no UTF-8.")
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
