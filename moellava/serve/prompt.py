"""What a model is asked: a question or a conversation with its images and videos, and the token ids that it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from moellava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from moellava.conversation import conv_templates
from moellava.data.media import pictures_of
from moellava.data.preprocess import encode_prompt, pieces_of
from moellava.data.records import KINDS, MEDIA_TAG, ROLES, tags_of
from moellava.data.video import Video
from moellava.errors import UserError

Picture = str | Path | Image.Image


@dataclass
class Request:
    """One thing to answer.

    Args:
        question: the text of a single turn. Images and videos are put before it, unless it has tags of that kind.
        images: paths or PIL images, in the order of the `<image>` tags.
        messages: instead of `question`, a LLaVA conversation `[{"from": "human"|"gpt", "value": str}, …]` that ends
            with a human turn.
        videos: frames of videos, as of `read_video`, in the order of the `<video>` tags.

    Raises:
        UserError: turns that do not alternate, or tags that are not as many as images or videos.
    """

    question: str | None = None
    images: Sequence[Picture] = ()
    messages: Sequence[dict[str, str]] = field(default_factory=list)
    videos: Sequence[Video] = ()

    def __post_init__(self) -> None:
        if (self.question is None) == (not self.messages):
            raise UserError("A request has either a question or messages.")
        if self.question is not None:
            question = self.question
            for kind, shown in self._shown().items():
                question = with_tags(question, len(shown), f"<{kind}>")
            self.messages = [{"from": "human", "value": question}]
        roles = [message["from"] for message in self.messages]
        if roles != ["human", "gpt"] * (len(roles) // 2) + ["human"]:
            raise UserError(f"Messages go human, gpt, human … and end with human; these are {', '.join(roles)}.")
        tags = tags_of(self.messages)
        for kind, shown in self._shown().items():
            if tags.count(kind) != len(shown):
                raise UserError(
                    f"The request has {len(shown)} {kind}s but {tags.count(kind)} <{kind}> tags: "
                    f"{self.messages[-1]['value'][:80]!r}"
                )

    def in_images(self) -> Request:
        """The same request with every video as its frames, for models that see images only."""
        if not self.videos:
            return self
        left = {kind: iter(shown) for kind, shown in self._shown().items()}
        images = [pictures_of(next(left[kind])) for kind in tags_of(self.messages)]
        counts = iter(map(len, images))
        messages = [
            {**turn, "value": MEDIA_TAG.sub(lambda _: DEFAULT_IMAGE_TOKEN * next(counts), turn["value"])}
            if turn["from"] == ROLES[0]
            else turn
            for turn in self.messages
        ]
        return Request(messages=messages, images=[image for row in images for image in row])

    def _shown(self) -> dict[str, Sequence[Any]]:
        return dict(zip(KINDS, (self.images, self.videos), strict=True))


def with_tags(question: str, count: int, tag: str = DEFAULT_IMAGE_TOKEN) -> str:
    """A question with one tag per image (or video) in front, unless it says itself where they stand."""
    if count == 0 or tag in question:
        return question
    return f"{tag}\n" * count + question


def version_of(model: Any, version: str | None = None) -> str:
    """The template that a model was trained with, from its saved config. Raises UserError where it names none."""
    if version is None:
        version = (getattr(model.config, "moellava", None) or {}).get("version")
    if version is None:
        raise UserError(
            "The model's config does not say which conversation template it was trained with: name it with --version "
            f"({', '.join(conv_templates)})."
        )
    return version


def encode(request: Request, tokenizer: Any, version: str, image_ids: Sequence[int]) -> list[int]:
    """The token ids of a request in its template, from the engine that training uses."""
    return encode_prompt(request.messages, tokenizer, version, bool(request.images), image_ids)


def text_of(request: Request, tokenizer: Any, version: str) -> str:
    """The prompt as text, as a report shows it."""
    pieces = pieces_of(request.messages, tokenizer, version, bool(request.images), opens=True)
    return "".join(piece.text for piece in pieces)


def image_ids_of(model: Any, tokenizer: Any) -> list[int]:
    """What one image becomes in the ids: the placeholder, between start and end tokens where the model has them."""
    if not (getattr(model.config, "moellava", None) or {}).get("use_im_start_end"):
        return [IMAGE_TOKEN_INDEX]
    start, end = tokenizer.convert_tokens_to_ids([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN])
    return [start, IMAGE_TOKEN_INDEX, end]
