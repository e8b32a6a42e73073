# SPDX-License-Identifier: Apache-2.0
"""A record as its file has it -> a record as LLaVA has it, by the tables of `record_keys.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moellava.constants import MODALITIES, ROLES
from moellava.data.record_keys import (
    KEYS,
    Meaning,
    brief,
    brief_text,
    changes_nothing,
    is_empty,
    media_paths,
    refuse_meaning,
)
from moellava.data.told import Speakers, Told, told
from moellava.errors import DataError

Paths = str | list[str]


class RecordReader:
    """Reads the records of files.

    Args:
        roles: what the records call the human and the model, beside the usual names.

    Attributes:
        ignored: key -> records in which it meant nothing; emptied by whoever reports it.
    """

    def __init__(self, roles: tuple[str, str] = ROLES):
        self.speakers = Speakers(roles)
        self.ignored: dict[str, int] = {}

    def read(self, entry: Any) -> dict[str, Any]:
        """A record: `conversations`, and where they are given `image`, `video` and `system_prompt`; other keys stay.

        Raises:
            DataError: something in it would be dropped or cannot be read, as the end of a sentence.
        """
        if not isinstance(entry, dict):
            raise DataError(f"is no JSON object: {brief(entry)}")
        given = _by_meaning(entry)
        rest = {key: value for key, value in entry.items() if KEYS.get(key) in (None, Meaning.NOTE)}
        unknown = {key for key in rest if key not in KEYS and not is_empty(rest[key])}
        for key in unknown:
            refuse_meaning(key, rest[key])
        record, found = self._turns(given.get(Meaning.TURNS, {}), entry)
        record |= self._media(given, found)
        system = _system(given.get(Meaning.SYSTEM, {}), found)
        for key in unknown | (found.ignored if found else set()):
            self.ignored[key] = self.ignored.get(key, 0) + 1
        return rest | record | ({"system_prompt": system} if system else {})

    def _turns(self, given: Mapping[str, Any], entry: dict[str, Any]) -> tuple[dict[str, Any], Told | None]:
        """The turns as a part of the record; what is no list of turns stays as it is, for `problem_of` to tell."""
        if not given:
            empty = next((key for key in entry if KEYS.get(key) is Meaning.TURNS), None)
            return ({} if empty is None else {"conversations": entry[empty]}), None
        readings = {key: told(value, self.speakers) for key, value in given.items()}
        found = _agreed(readings)
        if found is None:
            return {"conversations": next(iter(given.values()))}, None
        return {"conversations": found.turns}, found

    def _media(self, given: Mapping[Meaning, Mapping[str, Any]], found: Told | None) -> dict[str, Paths]:
        """The images and videos of a record, from its keys or from the parts of its messages."""
        record: dict[str, Paths] = {}
        for modality, meaning in zip(MODALITIES, (Meaning.IMAGE, Meaning.VIDEO), strict=True):
            values = given.get(meaning, {})
            paths = _agreed({key: media_paths(key, value) for key, value in values.items()}, _listed)
            shown = found.media[modality] if found and found.media else None
            if paths and shown is not None and _listed(paths) != shown:
                raise DataError(f'has "{next(iter(values))}", and its messages name other {modality}s: {brief(shown)}')
            if paths or shown:
                record[modality] = paths or shown or []
        if found and found.in_pairs and found.turns:
            _tag(found.turns, record)
        return record


def _by_meaning(entry: Mapping[str, Any]) -> dict[Meaning, dict[str, Any]]:
    """The keys of a record that say something, by what they mean. Raises DataError for one that would not act."""
    given: dict[Meaning, dict[str, Any]] = {}
    for key, value in entry.items():
        meaning = KEYS.get(key)
        if meaning is None or meaning is Meaning.NOTE or is_empty(value):
            continue
        if meaning is Meaning.REFUSED:
            raise DataError(f'has "{key}", which would not act here: {brief(value)}')
        if meaning is Meaning.WEIGHT and not changes_nothing(value):
            raise DataError(
                f'has "{key}" {brief(value)}, but records all count the same: leave it out (--skip_list), repeat '
                'it, or say it of single answers ("train": false in a turn)'
            )
        given.setdefault(meaning, {})[key] = value
    return given


def _agreed(readings: Mapping[str, Any], essence: Any = lambda value: value) -> Any:
    """What several keys of the same meaning say; None where there is none. Raises DataError where they differ."""
    if not readings:
        return None
    first, *others = readings.values()
    if any(essence(other) != essence(first) for other in others):
        raise DataError(f"has {' and '.join(map(repr, readings))}, which mean the same and differ")
    return first


def _listed(paths: Paths) -> list[str]:
    return [paths] if isinstance(paths, str) else paths


def _system(given: Mapping[str, Any], found: Told | None) -> str | None:
    """The system prompt of a record, from its keys or its first turn; None without one."""
    for key, value in given.items():
        if not isinstance(value, str):
            raise DataError(f'has a "{brief_text(key)}" that is no text: {brief(value)}')
    prompt = _agreed(given)
    turn = found.system if found else None
    if prompt and turn and prompt != turn:
        raise DataError(f'has "{next(iter(given))}" and a system turn, which differ')
    return prompt or turn


def _tag(turns: list[dict[str, Any]], media: Mapping[str, Paths]) -> None:
    """Puts tags for all media before the first question, where no question has one."""
    tags = [f"<{modality}>" for modality, paths in media.items() for _ in _listed(paths)]
    if not any(f"<{modality}>" in turn["value"] for modality in MODALITIES for turn in turns[::2]):
        turns[0]["value"] = "".join(f"{tag}\n" for tag in tags) + turns[0]["value"]
