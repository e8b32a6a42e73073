# SPDX-License-Identifier: Apache-2.0
"""What a record is, and what is wrong with one whatever the template. See `records.py`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moellava.constants import MODALITIES, ROLES
from moellava.data.record_keys import asked_in, brief, brief_text

Source = Sequence[dict[str, Any]]
"""A conversation as LLaVA stores it: `[{"from": "human" | "gpt", "value": text}, …]`."""

MEDIA_TAG = re.compile(f"<({'|'.join(MODALITIES)})>")


class Medium(NamedTuple):
    """An image or a video of a record.

    Attributes:
        modality: of `MODALITIES`.
        path: of its file, as the record writes it, or a data URI; in a chat also the image or the video itself.
    """

    modality: str
    path: Any


def paths_of(record: dict[str, Any], modality: str) -> list[Any]:
    """The image or video paths of a record, as it writes them."""
    paths = record.get(modality)
    if not paths:
        return []
    return list(paths) if isinstance(paths, list | tuple) else [paths]


def with_paths(record: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A record, other paths in the place of those of its images and videos."""
    for modality in MODALITIES:
        if paths := paths_of(record, modality):
            changed = [change(path) for path in paths]
            record[modality] = changed if isinstance(record[modality], list) else changed[0]
    return record


def shows_media(record: dict[str, Any]) -> bool:
    """Whether a record has images or videos."""
    return any(record.get(modality) for modality in MODALITIES)


def media_of(record: dict[str, Any]) -> list[Medium]:
    """The images and videos of a sound record, in the order of their tags. Without any, tags are text."""
    if not shows_media(record):
        return []
    left = {modality: iter(paths_of(record, modality)) for modality in MODALITIES}
    return [Medium(modality, next(left[modality])) for modality in tags_of(record["conversations"])]


def tags_of(source: Source) -> list[str]:
    """What the media tags stand for in the questions of a conversation, in their order."""
    return [modality for turn in source if turn["from"] == ROLES[0] for modality in MEDIA_TAG.findall(turn["value"])]


def trained_answers(source: Source) -> list[bool]:
    """For each answer of a conversation, whether it is trained on; one that leads it is left out, as everywhere."""
    turns = source[1:] if source[0]["from"] == ROLES[1] else source
    return [turn.get("train") is not False for turn in turns if turn["from"] == ROLES[1]]


def problem_of(record: dict[str, Any]) -> str | None:
    """What is wrong with a record whatever the template, as the end of a sentence; None if nothing is."""
    if "conversations" not in record:
        keys = brief_text(", ".join(map(str, record)) or "none")
        return f'has no "conversations" (its keys: {keys}){asked_in(record)}'
    return problem_of_turns(record["conversations"]) or _problem_of_counts(record)


def problem_of_turns(source: Any) -> str | None:
    """What is wrong with the turns of a conversation, as the end of a sentence; None if nothing is."""
    if not isinstance(source, Sequence) or isinstance(source, str):
        return f"has no list of turns: {brief(source)}"
    for number, turn in enumerate(source):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
            return f'has a turn {number} that is not {{"from": …, "value": text}}: {brief(turn)}'
        if turn["from"] not in ROLES:
            return f"has a turn {number} from {brief(turn['from'])}; known are {' and '.join(map(repr, ROLES))}"
    if not source:
        return "has no turns"
    skipped = 1 if source[0]["from"] == ROLES[1] else 0
    if len(source) == skipped:
        return "has no question"
    for number, turn in enumerate(source[skipped:], start=skipped):
        if turn["from"] != ROLES[(number - skipped) % 2]:
            return f"has roles that do not alternate: turns {number - 1} and {number} are both from {turn['from']!r}"
    return None


def _problem_of_counts(record: dict[str, Any]) -> str | None:
    turns = record["conversations"]
    if not shows_media(record):
        return None
    tags = tags_of(turns)
    for modality in MODALITIES:
        given = len(paths_of(record, modality))
        if tags.count(modality) != given:
            shown = brief(turns[0]["value"])
            return f"has {given} {modality}s but {tags.count(modality)} <{modality}> tags in its questions: {shown}"
    return None
