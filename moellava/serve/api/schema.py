# SPDX-License-Identifier: Apache-2.0
"""The body of a chat completion, as OpenAI's API has it: what is taken of it, and what it asks the model.

A field that this server would not act on is refused by name, unless it changes nothing about the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moellava.constants import DEFAULT_IMAGE_TOKEN
from moellava.data.embedded import Embedded, content_of, is_embedded, mime_of
from moellava.data.images import image_size
from moellava.serve.api.limits import ServerLimits
from moellava.serve.api.refusals import Refusal
from moellava.serve.api.remote import fetched, is_remote
from moellava.serve.generate import Sampling
from moellava.serve.prompt import Request

NEW_TOKENS = 512
"""The longest answer, in tokens, where a request does not say; at most what the server allows."""

MOST_LIKELY = 20
"""How many tokens `top_logprobs` may ask for, as in OpenAI's API."""

STOPS = 4
"""How many texts may stop an answer, as in OpenAI's API."""

ROLES = {"user": "human", "assistant": "gpt"}


class Strict(BaseModel):
    """Unknown fields, and values of another type, are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageURL(Strict):
    """Where a picture is. `detail` changes nothing: the model's processor says how pictures are cut."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Strict):
    """A turn, or the system prompt. `name` changes nothing."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None


class StreamOptions(Strict):
    """Whether a last piece tells the usage."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class PlainText(Strict):
    """The one format of answers here."""

    type: Literal["text"]


class ChatBody(Strict):
    """`POST /v1/chat/completions`."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None

    # What is taken because it changes nothing about an answer …
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    # … or with these values alone.
    n: Literal[1] | None = None
    response_format: PlainText | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None


@dataclass(frozen=True)
class Question:
    """What a client wants to know, and how.

    Attributes:
        request: the conversation and what it shows.
        sampling: how tokens are chosen.
        stops: texts that end an answer, and are no part of it.
        top_logprobs: how many likely tokens are told beside each token; None: nothing is told of likelihoods.
        counts_experts: tell which experts were visited.
    """

    request: Request
    sampling: Sampling
    stops: tuple[str, ...] = ()
    top_logprobs: int | None = None
    counts_experts: bool = False


def parsed(body: bytes) -> ChatBody:
    """A body. Raises Refusal, which names each field that is wrong."""
    try:
        return ChatBody.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
    named = [(".".join(str(step)[:40] for step in one["loc"]), one["msg"]) for one in problems]
    text = "; ".join(f"{place}: {message}" if place else message for place, message in named)
    raise Refusal(text, param=named[0][0] or None)


def question_of(body: ChatBody, limits: ServerLimits) -> Question:
    """What a body asks. Fetches pictures where that is allowed: not to be called in the event loop.

    Raises:
        UserError: turns out of order, pictures or options beyond the limits or without meaning.
    """
    return Question(request_of(body.messages, limits), sampling_of(body, limits), stops_of(body), likelihoods_of(body))


def request_of(messages: Sequence[Message], limits: ServerLimits) -> Request:
    """The conversation. Raises UserError: see `question_of`."""
    system = [message for message in messages if message.role in ("system", "developer")]
    turns = [message for message in messages if message.role in ROLES]
    if len(system) > 1 or (system and messages[0] is not system[0]):
        raise Refusal("One message of the system may stand at the beginning, and nowhere else.", param="messages")
    prompt = None if not system else _text_of(system[0], lambda _: _no_pictures("system"))
    said, urls = [], list[str]()
    for message in turns:
        show = urls.append if message.role == "user" else lambda _: _no_pictures("assistant")
        said.append({"from": ROLES[message.role], "value": _text_of(message, show)})
    shown = pictures_of(urls, limits)
    return Request(messages=said, images=shown, system_prompt=prompt)


def _text_of(message: Message, show: Callable[[str], Any]) -> str:
    """A message's text, a line for each part; a picture is its tag, and `show` is told its URL."""
    if isinstance(message.content, str):
        return message.content
    lines = []
    for part in message.content:
        if isinstance(part, ImagePart):
            show(part.image_url.url)
        lines.append(DEFAULT_IMAGE_TOKEN if isinstance(part, ImagePart) else part.text)
    return "\n".join(lines)


def _no_pictures(role: str) -> None:
    raise Refusal(f"A message of the {role} shows a picture; those of the user alone may.", param="messages")


def pictures_of(urls: Sequence[str], limits: ServerLimits) -> list[str]:
    """Pictures as data URIs. Raises UserError for too many or too large ones, and for what is none."""
    if len(urls) > limits.images:
        raise Refusal(f"The request has {len(urls)} pictures, and this server takes {limits.images}.", param="messages")
    shown = [picture_of(url, limits) for url in urls]
    require_pixels([content_of(uri) for uri in shown], limits)
    return shown


def picture_of(url: str, limits: ServerLimits) -> str:
    """A picture as a data URI. Raises UserError where it is no picture by its first bytes, or may not be fetched."""
    if is_remote(url):
        url = fetched(url, limits)
    if not is_embedded(url):
        raise Refusal("image_url is neither a data URI (data:image/png;base64,…) nor http(s)://….", param="messages")
    mime = mime_of(content_of(url))
    if not mime.startswith("image/"):
        raise Refusal(f"A picture is {mime} by its first bytes, which is no picture.", param="messages")
    return url


def require_pixels(pictures: Sequence[bytes], limits: ServerLimits) -> None:
    """Raises UserError where pictures are too large, one of them or all together, by what their heads say."""
    sizes = [image_size(Embedded(content), limits.image) for content in pictures]
    pixels = sum(width * height for width, height in sizes)
    if pixels > limits.image.pixels:
        raise Refusal(
            f"The pictures have {pixels} pixels together, and this server takes {limits.image.pixels}.", 413, "messages"
        )


def sampling_of(body: ChatBody, limits: ServerLimits) -> Sampling:
    """How tokens are chosen. Raises UserError: see `Sampling`, and `ServerLimits.new_tokens`."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise Refusal("max_tokens and max_completion_tokens are one thing: give one of them.", param="max_tokens")
    named = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    tokens = min(NEW_TOKENS, limits.new_tokens) if named is None else named
    if tokens > limits.new_tokens:
        raise Refusal(
            f"{tokens} tokens are asked for, and an answer of this server has {limits.new_tokens} at most.",
            param="max_tokens",
        )
    options = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
    given = {name: getattr(body, name) for name in options if getattr(body, name) is not None}
    return Sampling(max_new_tokens=tokens, **given)


def stops_of(body: ChatBody) -> tuple[str, ...]:
    """The texts that end an answer. Raises Refusal for too many, or one that says nothing."""
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(stops) > STOPS or not all(stops):
        raise Refusal(f"stop is a text, or up to {STOPS} of them, none empty.", param="stop")
    return stops


def likelihoods_of(body: ChatBody) -> int | None:
    """See `Question.top_logprobs`. Raises Refusal for a number of tokens without the wish for likelihoods."""
    if body.top_logprobs is not None and not body.logprobs:
        raise Refusal("top_logprobs goes with logprobs: true.", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None
