# SPDX-License-Identifier: Apache-2.0
"""All that decides over how an encoder reads a record, as one digest: what it has found once is found again by it.

What cannot be seen from outside is asked: the encoder reads a few conversations, and sizes a few images. So the date
that a chat template prints, or a setting nobody thought of, makes another digest.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import moellava
from moellava.data.encoder import Encoder
from moellava.errors import DataError, UserError

PACKAGES = ("transformers", "tokenizers", "jinja2", "pillow", "av")
"""Packages that read text, images and videos."""

ROOMS = ("constants.py", "conversation.py", "data", "lmm")
"""The code of this package that does."""

TALKS: tuple[list[tuple[str, str]], ...] = (
    [("human", "What is it?"), ("gpt", "  A cat.\n\nIt sleeps: 123 naïve 🐱 hours.")],
    [("human", "<s> [INST]"), ("gpt", "One"), ("human", "Two"), ("gpt", "Three.")],
)

SIZES = ((336, 336), (640, 480), (1200, 300))
"""Width and height of the images whose positions are asked for."""


def fingerprint(encoder: Encoder) -> str:
    """Of an encoder. Where something in it cannot be put into words, each process has another one."""
    reader = encoder.reader
    parts = [
        versions(),
        _of_tokenizer(encoder.tokenizer),
        _of_object(encoder.renderer),
        repr(getattr(encoder.renderer, "template", None)),
        _of_object(reader),
        repr(getattr(reader, "fixed_run", None)),
        processor_settings(reader.processor),
        encoder.image_ids,
        [_ids(encoder, talk) for talk in TALKS],
        [reader.run_length(size, count) for size in SIZES for count in (1, 2)] if reader.needs_sizes else [],
    ]
    return hashlib.sha256(json.dumps(parts, default=repr).encode()).hexdigest()[:32]


@functools.cache
def versions(packages: tuple[str, ...] = PACKAGES, rooms: tuple[str, ...] = ROOMS) -> list[str]:
    """Of packages and of our own code, by which what they found is kept apart."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(name)
    root = Path(moellava.__file__).parent
    for room in rooms:
        sources = [root / room] if room.endswith(".py") else sorted((root / room).rglob("*.py"))
        found += [hashlib.sha256(source.read_bytes()).hexdigest() for source in sources]
    return found


def _of_tokenizer(tokenizer: Any) -> Any:
    """A fast tokenizer, but for the padding and truncation of its last call, which stand before its tokens."""
    state = tokenizer.backend_tokenizer.to_str()
    digest = hashlib.sha256(state[state.find('"added_tokens"') :].encode()).hexdigest()
    own = {name: getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "chat_template")}
    return [type(tokenizer).__name__, tokenizer.special_tokens_map, own, digest]


def _of_object(thing: Any) -> Any:
    """Its class, and those of its attributes that are plain values."""
    plain = {key: value for key, value in sorted(vars(thing).items()) if _is_plain(value)}
    return [type(thing).__module__, type(thing).__qualname__, plain]


def processor_settings(processor: Any) -> Any:
    """A processor with its parts, as their settings say."""
    if processor is None:
        return None
    parts: list[Any] = [getattr(processor, name, None) for name in ("image_processor", "video_processor")]
    settings = [part.to_dict() if hasattr(part, "to_dict") else _of_object(part) for part in parts if part is not None]
    return [_of_object(processor), *settings]


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _ids(encoder: Encoder, talk: list[tuple[str, str]]) -> Any:
    """What is read of a conversation, or why nothing is."""
    record = {"conversations": [{"from": speaker, "value": text} for speaker, text in talk]}
    try:
        return [example.ids for _, example in encoder.examples(record)]
    except (DataError, UserError) as error:
        return str(error)
