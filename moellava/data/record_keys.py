# SPDX-License-Identifier: Apache-2.0
"""What the keys of a record mean, as data. Whatever carries meaning acts or is refused by name; nothing is dropped.

A key that is in no table is looked at: if its value is what a path of a file or a list of turns looks like, the record
is refused, because somebody meant it; otherwise it stays in the record, means nothing, and is reported once per file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from reprlib import Repr
from typing import Any
from urllib.parse import unquote

from moellava.data.embedded import data_uri, is_embedded, is_part
from moellava.errors import DataError


class Meaning(Enum):
    """What a key of a record is for."""

    IMAGE = "image"
    VIDEO = "video"
    TURNS = "conversations"
    SYSTEM = "system_prompt"
    WEIGHT = "weight"
    """How much the record counts: only what changes nothing (1, true) is taken."""
    NOTE = "note"
    """Nothing that training or answering would use."""
    REFUSED = "refused"
    """Something that is meant to act, and would not: only an empty value is taken."""


class TurnMeaning(Enum):
    """What a key of a turn is for."""

    WHO = "from"
    TEXT = "value"
    CALLS = "calls"
    """Calls of tools that an answer consists of, or ends with."""
    TRAINED = "trained"
    """Whether an answer is trained on: 1 or 0, true or false."""
    UNTRAINED = "untrained"
    """The opposite."""
    NOTE = "note"
    REFUSED = "refused"


KEYS: dict[str, Meaning] = {
    **dict.fromkeys(
        ("image", "images", "image_path", "image_paths", "image_file", "image_files", "image_url", "image_urls")
        + ("img", "img_path"),
        Meaning.IMAGE,
    ),
    **dict.fromkeys(
        ("video", "videos", "video_path", "video_paths", "video_file", "video_files", "video_url", "video_urls"),
        Meaning.VIDEO,
    ),
    **dict.fromkeys(
        ("conversations", "conversation", "messages", "dialogue", "dialog", "turns", "texts"), Meaning.TURNS
    ),
    **dict.fromkeys(("system_prompt", "system", "system_message"), Meaning.SYSTEM),
    **dict.fromkeys(("loss", "weight", "train", "loss_scale", "loss_weight", "sample_weight"), Meaning.WEIGHT),
    **dict.fromkeys(
        ("id", "image_id", "video_id", "question_id", "conversation_id", "sample_id", "uid", "uuid", "idx", "index")
        + ("source", "sources", "dataset", "dataset_name", "data_source", "subset", "split", "origin", "url", "license")
        + ("score", "scores", "rating", "ratings", "quality", "similarity", "clip_score", "confidence")
        + ("category", "categories", "task", "task_type", "type", "tags", "topic", "domain", "difficulty", "level")
        + ("model", "generator", "annotator", "author", "language", "lang", "version", "created", "timestamp", "date")
        + ("width", "height", "image_size", "duration", "fps", "num_frames", "length", "num_turns", "num_tokens")
        + ("hash", "md5", "sha256", "meta", "metadata", "extra", "comment", "blip_caption"),
        Meaning.NOTE,
    ),
    **dict.fromkeys(
        ("tools", "functions", "history", "chosen", "rejected", "rejected_response", "rejected_messages")
        + ("audio", "audios", "audio_path", "speech", "start_time", "end_time", "video_start", "video_end")
        + ("mask", "masks", "depth", "point_cloud"),
        Meaning.REFUSED,
    ),
}
"""Key of a record -> what it is for. Of the keys with the same meaning a record may have one, or several that agree."""

TURN_KEYS: dict[str, TurnMeaning] = {
    **dict.fromkeys(("from", "role"), TurnMeaning.WHO),
    **dict.fromkeys(("value", "content"), TurnMeaning.TEXT),
    **dict.fromkeys(("tool_calls", "function_call"), TurnMeaning.CALLS),
    **dict.fromkeys(("loss", "weight", "train", "loss_weight", "trainable"), TurnMeaning.TRAINED),
    **dict.fromkeys(("masked",), TurnMeaning.UNTRAINED),
    **dict.fromkeys(
        ("id", "name", "tool_call_id", "source", "timestamp", "model", "language", "lang", "finish_reason")
        + ("score", "metadata", "markdown", "index", "detail"),
        TurnMeaning.NOTE,
    ),
    **dict.fromkeys(
        [key for key, meaning in KEYS.items() if meaning in (Meaning.IMAGE, Meaning.VIDEO)]
        + ["audio", "audios", "reasoning", "reasoning_content", "thinking", "refusal", "function", "tools"]
        + ["loss_scale", "prefix", "annotations"],
        TurnMeaning.REFUSED,
    ),
}
"""Key of a turn -> what it is for."""

_MEDIA_NAME = re.compile(
    r"\.(png|jpe?g|jfif|gif|bmp|webp|tiff?|avif|heic|svg|ppm|mp4|mkv|mov|avi|webm|mpe?g|m4v|flv|wmv|wav|mp3|flac|ogg|m4a"
    r"|opus|npy|npz|pdf)$",
    re.IGNORECASE,
)

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)

_LONGEST_PATH = 1024
"""Characters; what is longer is no path that somebody has typed."""

_BARE_BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
"""How PNG, JPEG, GIF and WebP begin in base64."""

_FILE_SOURCES = {"bytes", "base64", "url", "path"}
_FILE_NOTES = {"detail", "format", "mime_type", "width", "height", "id"}
"""Keys of an object that stands for a file: where it is, and what means nothing."""

_SHORTEST_BARE = 300
"""Characters of base64 that are an image and no path."""

_short = Repr()
_short.maxstring = _short.maxother = 80
_short.maxlevel = 3
_short.maxdict = _short.maxlist = 6


def brief(value: Any) -> str:
    """A value for a message: short, however large or deep it is, and without control characters."""
    return _short.repr(value)


def brief_text(value: Any) -> str:
    """A text for a message, as it stands if it is short and can be printed."""
    text = value if isinstance(value, str) else str(value) if isinstance(value, int | float) else brief(value)
    text = text if len(text) <= 200 else f"{text[:120]}…{text[-60:]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


SINGLE_TURNS = (("instruction", "output"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
"""Pairs of keys in which other formats keep one question and its answer; Alpaca's question goes on in `input`."""


def asked_in(record: Mapping[Any, Any]) -> str:
    """What to do with a record that has one question and its answer under keys of another format, or nothing."""
    pair = next((pair for pair in SINGLE_TURNS if set(pair) <= record.keys()), None)
    if pair is None:
        return ""
    question, answer = pair
    asked = f"{question} and input" if "input" in record else question
    turns = f'[{{"from": "human", "value": {asked}}}, {{"from": "gpt", "value": {answer}}}]'
    return f': one question and its answer (Alpaca\'s format, or like it), which go into "conversations": {turns}'


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, an empty text, list or object. Tables have such in every row."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def changes_nothing(value: Any) -> bool:
    """Whether a weight is that of every other record."""
    return is_empty(value) or value is True or (isinstance(value, int | float) and value == 1)


def media_paths(key: str, value: Any) -> str | list[str]:
    """The value of a key for images or videos, as a path or a list of paths, data URIs among them.

    Raises:
        DataError: something that is neither, as the end of a sentence.
    """
    if isinstance(value, list):
        return [_path_of(key, item) for item in value]
    if isinstance(value, str | bytes | dict):
        return _path_of(key, value)
    raise DataError(f'has "{key}", which is neither a path nor a list of paths: {brief(value)}')


def _path_of(key: str, item: Any) -> str:
    if isinstance(item, dict):
        given = {name: value for name, value in item.items() if name not in _FILE_NOTES and not is_empty(value)}
        if set(given) == {"bytes", "path"}:
            del given["path"]  # how `datasets` keeps an image: the path says where the bytes were read
        if len(given) != 1 or not set(given) <= _FILE_SOURCES:
            raise DataError(f'has an entry of "{key}" that is no path: {brief(item)}')
        ((name, inner),) = given.items()
        if name in ("bytes", "base64") and isinstance(inner, str) and not is_embedded(inner):
            return f"data:;base64,{inner}"
        return _path_of(key, inner)
    if isinstance(item, bytes) and item:
        return data_uri(item)
    if not isinstance(item, str) or not item:
        raise DataError(f'has an entry of "{key}" that is no path: {brief(item)}')
    if is_part(item):
        raise DataError(f'has an entry of "{key}" that names a part of a shard, as no record may: {brief(item)}')
    if is_embedded(item):
        return item
    if len(item) > _SHORTEST_BARE and item.startswith(_BARE_BASE64):
        return f"data:;base64,{item}"
    if item.startswith("file://"):
        return unquote(item[len("file://") :])
    if _URL.match(item):
        raise DataError(
            f'has an entry of "{key}" that is a URL, and nothing is downloaded: {brief(item)}; name a file instead'
        )
    return item


def refuse_meaning(key: str, value: Any, where: str = "") -> None:
    """Raises DataError for a key that no table has and whose value looks as if it were meant to act.

    Args:
        key: its name.
        value: anything.
        where: ' in turn 3', in a turn.
    """
    if _is_media(value):
        raise DataError(
            f'has "{key}"{where}, which looks like a path of a file: {brief(value)}; images are read from "image" and '
            'videos from "video"'
        )
    if _is_turns(value):
        raise DataError(f'has "{key}"{where}, which looks like turns: {brief(value)}; they are read from "messages"')


def _is_media(value: Any) -> bool:
    if isinstance(value, str):
        is_name = len(value) <= _LONGEST_PATH and "\n" not in value and _MEDIA_NAME.search(value.rstrip()) is not None
        return is_name or is_embedded(value)
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes) or any(_is_media(value.get(name)) for name in ("path", "url"))
    return isinstance(value, bytes) or (isinstance(value, list) and any(map(_is_media, value)))


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and any(
        isinstance(row, dict) and ({"from", "role"} & row.keys()) and ({"value", "content"} & row.keys())
        for row in value
    )
