# SPDX-License-Identifier: Apache-2.0
"""The conversation of a record, however it is written, as LLaVA writes it.

    {"role": "system", "content": "Be brief."}                         system prompt
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"from": "human", "value": "<image>\\nWhat?"}
                                 {"type": "text", "text": "What?"}]}
    {"role": "assistant", "content": "A cat.", "loss": 0}             {"from": "gpt", "value": "A cat.", "train": false}

A list of parts becomes text with tags in the way that `parts_of_text` takes back: the line break of LLaVA's own
`<image>\\n` and `\\n<image>` stands where a question begins or ends with media, and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

from moellava.constants import MODALITIES, ROLES
from moellava.data.record_keys import (
    TURN_KEYS,
    TurnMeaning,
    brief,
    brief_text,
    is_empty,
    media_paths,
    refuse_meaning,
)
from moellava.errors import DataError

HUMAN, MODEL = ROLES
SYSTEM, TOOL, CALL = "system", "tool", "call"

SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), HUMAN),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt"), MODEL),
    **dict.fromkeys(("system", "developer"), SYSTEM),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response"), TOOL),
    **dict.fromkeys(("function_call", "tool_call"), CALL),
}
"""What records call who speaks, in small letters -> who that is. What a tool gives is text that the model reads, so it
is a question; a call of a tool is text that the model writes."""

TEXT_PARTS = ("text", "input_text", "output_text")
MEDIA_PARTS = {f"{prefix}{modality}{ending}": modality for modality in MODALITIES
               for prefix in ("", "input_") for ending in ("", "_url")}  # fmt: skip
"""Type of a part -> what it shows. Its source stands under the type's own name, or one of these."""
SOURCES = ("image", "video", "image_url", "video_url", "url", "path", "base64", "bytes")
PART_NOTES = ("type", "detail", "id", "index", "format")

CALL_NOTES = ("id", "type", "index")

Shown = list[tuple[str, str | None]]
"""What a message shows: (modality, where it lies), None where the record's own list says it."""


class Turn(NamedTuple):
    """A turn of a record, read.

    Attributes:
        number: in the record.
        speaker: of `SPEAKERS`.
        text: what is said, with a tag for everything shown.
        shown: see `Shown`.
        is_trained: False where an answer is not to be trained on.
    """

    number: int
    speaker: str
    text: str
    shown: Shown
    is_trained: bool


@dataclass
class Told:
    """What a record tells.

    Attributes:
        turns: as LLaVA has them; an answer that is not trained on has `"train": False`.
        system: the system prompt that opens them, or None.
        media: modality -> paths, in the order of the tags; None where the parts name none.
        ignored: names of keys that mean nothing.
        in_pairs: whether a question and its answer were one row, which has no tags.
    """

    turns: list[dict[str, Any]]
    system: str | None = None
    media: dict[str, list[str]] | None = None
    ignored: set[str] = field(default_factory=set)
    in_pairs: bool = False


class Speakers:
    """Who the names in records are.

    Args:
        roles: what the records call the human and the model, beside `SPEAKERS`.

    Attributes:
        seen: the names that were met.
    """

    def __init__(self, roles: tuple[str, str] = ROLES):
        self.roles = roles
        self.seen: set[str] = set()
        self._given = {name: ours for name, ours in zip(roles, ROLES, strict=True) if name != ours}

    def __getitem__(self, name: str) -> str | None:
        self.seen.add(name)
        return self._given.get(name) or SPEAKERS.get(name.strip().lower())

    @property
    def unmet(self) -> list[str]:
        """Of the names that were given, those that no record has."""
        return [name for name in self._given if name not in self.seen]


def told(value: Any, speakers: Speakers) -> Told | None:
    """The conversation in a record's list of turns; None where it is no such list.

    Raises:
        DataError: a turn that cannot be read, or that says more than could act, as the end of a sentence.
    """
    rows = _rows(value)
    if rows is None:
        return None
    if (plain := _as_they_stand(rows, speakers)) is not None:
        return Told(plain)
    ignored: set[str] = set()
    turns = [turn for number, row in enumerate(rows) for turn in _turns(row, number, speakers, ignored)]
    system, turns = _system_of(turns)
    merged = [_joined(list(group)) for group in _same_side(turns)]
    shown = [item for turn in merged for item in turn.shown]
    return Told(
        [_as_llava(turn) for turn in merged], system, _media_of(shown), ignored, bool(rows) and all(map(_is_pair, rows))
    )


def _as_they_stand(rows: list[Any], speakers: Speakers) -> list[dict[str, Any]] | None:
    """Turns that are LLaVA's already, nothing beside them; None for any other. Most records are of this form, and to
    look up what each key and name means would be half the work of reading them."""
    for row in rows:
        if type(row) is not dict or len(row) != 2 or row.get("from") not in ROLES or type(row.get("value")) is not str:
            return None
    if any(speakers[name] != name for name in {row["from"] for row in rows}):
        return None
    return [{"from": row["from"], "value": row["value"]} for row in rows]


def _rows(value: Any) -> list[Any] | None:
    """A list of objects. Tables also have it as an object of lists, or as JSON in a text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) != 1:
            raise DataError(f"has turns in columns of different lengths: {brief(value)}")
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return value if isinstance(value, list) else None


def _is_pair(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("user"), str) and isinstance(row.get("assistant"), str)


def _turns(row: Any, number: int, speakers: Speakers, ignored: set[str]) -> Iterator[Turn]:
    if _is_pair(row):
        rest = {key: value for key, value in row.items() if key not in ("user", "assistant")}
        meant = _check_keys(rest, number, ignored)
        if meant.keys() & {TurnMeaning.WHO, TurnMeaning.TEXT, TurnMeaning.CALLS}:
            raise DataError(f"has a turn {number} that is both a question with its answer and a message: {brief(row)}")
        yield Turn(number, HUMAN, row["user"], [], True)
        yield Turn(number, MODEL, row["assistant"], [], _is_trained(meant, MODEL, number))
        return
    meant = _check_keys(row, number, ignored) if isinstance(row, dict) else {}
    names, texts = meant.get(TurnMeaning.WHO, {}), meant.get(TurnMeaning.TEXT, {})
    calls = meant.get(TurnMeaning.CALLS, {})
    if not names or not (texts or calls):
        raise DataError(f'has a turn {number} that is not {{"from": …, "value": text}}: {brief(row)}')
    speaker = _speaker(names, number, speakers)
    text, shown = _said(_only(texts, number), row, number) if texts else ("", [])
    if shown and speaker not in (HUMAN, TOOL):
        raise DataError(f"has images or videos in turn {number}, which is no question")
    lines = [text] if text or not calls else []
    text = "\n".join([*lines, *(_call(call, number) for value in calls.values() for call in _listed(value))])
    yield Turn(number, speaker, text, shown, _is_trained(meant, speaker, number))


def _check_keys(row: dict[str, Any], number: int, ignored: set[str]) -> dict[TurnMeaning, dict[str, Any]]:
    """The keys of a turn by what they mean, without those that say nothing. An empty text says something."""
    meant: dict[TurnMeaning, dict[str, Any]] = {}
    for key, value in row.items():
        meaning = TURN_KEYS.get(key)
        if value is None or (is_empty(value) and meaning is not TurnMeaning.TEXT):
            continue
        if meaning is TurnMeaning.REFUSED:
            raise DataError(f'has "{brief_text(key)}" in turn {number}, which would not act here: {brief(value)}')
        if meaning is None:
            refuse_meaning(key, value, f" in turn {number}")
            ignored.add(key)
        else:
            meant.setdefault(meaning, {})[key] = value
    return meant


def _only(values: Mapping[str, Any], number: int) -> Any:
    """The one value that several keys of the same meaning give. Raises DataError if they differ."""
    first, *others = values.values()
    if any(other != first for other in others):
        raise DataError(f"has a turn {number} whose {' and '.join(map(repr, values))} differ")
    return first


def _speaker(names: Mapping[str, Any], number: int, speakers: Speakers) -> str:
    found = {speakers[name] if isinstance(name, str) else None for name in names.values()}
    if len(found) != 1 or None in found:
        shown = " and ".join(repr(brief_text(name)) for name in names.values())
        raise DataError(
            f"has a turn {number} from {shown}; known are {HUMAN!r} and {MODEL!r}, their usual other names "
            "(docs/DATA.md), and what --user_key and --assistant_key name"
        )
    (speaker,) = found
    return str(speaker)


def _said(content: Any, row: Any, number: int) -> tuple[str, Shown]:
    """A message as text with tags, and what the tags stand for."""
    if isinstance(content, str):
        return content, []
    parts = [content] if isinstance(content, dict) and "type" in content else _parts(content)
    if parts is None:
        raise DataError(f'has a turn {number} that is not {{"from": …, "value": text}}: {brief(row)}')
    read = [_part(part, number) for part in parts]
    return tagged(read), [(modality, source) for modality, source in read if modality != "text"]


def _parts(content: Any) -> list[Any] | None:
    return None if isinstance(content, str) else _rows(content)


def _part(part: Any, number: int) -> tuple[str, str | None]:
    """('text', the text), or (modality, its source or None)."""
    if isinstance(part, str):
        return "text", part
    given = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
    name = given.get("type", "text")
    modality = MEDIA_PARTS.get(name) if isinstance(name, str) else None
    if modality is None and (name not in TEXT_PARTS or not isinstance(given.get("text"), str)):
        raise DataError(f"has a turn {number} with a part that is neither text, image nor video: {brief(part)}")
    own = SOURCES if modality else ("text",)
    sources = {key: value for key, value in given.items() if key in own and not is_empty(value)}
    extra = [key for key in given if key not in (*own, *PART_NOTES) and not is_empty(given[key])]
    if extra:
        raise DataError(f"has a turn {number} with {brief_text(extra[0])!r} in a part, which would not act here")
    if modality is None:
        return "text", given["text"]
    if len(sources) > 1:
        raise DataError(f"has a turn {number} with a part of several sources: {', '.join(sources)}")
    if not sources:
        return modality, None
    ((key, value),) = sources.items()
    path = media_paths(key, {key: value} if key in ("bytes", "base64") else value)
    if not isinstance(path, str):
        raise DataError(f"has a turn {number} with a part that is a list: {brief(part)}")
    return modality, path


def tagged(parts: Sequence[tuple[str, str | None]]) -> str:
    """Parts of a message as LLaVA writes them; `parts_of_text` gives them back, texts that touch joined."""
    joined: list[tuple[str, str]] = []
    for is_text, group in groupby((part for part in parts if part != ("text", "")), lambda part: part[0] == "text"):
        if is_text:
            joined.append(("text", "".join(text or "" for _, text in group)))
        else:
            joined += [(name, f"<{name}>") for name, _ in group]
    texts = [number for number, (name, _) in enumerate(joined) if name == "text"]
    if not texts:
        return "\n".join(tag for _, tag in joined)
    lead, trail = joined[: texts[0]], joined[texts[-1] + 1 :]
    middle = "".join(text for _, text in joined[texts[0] : texts[-1] + 1])
    return "".join(f"{tag}\n" for _, tag in lead) + middle + ("\n" if trail else "") + "".join(tag for _, tag in trail)


def _call(call: Any, number: int) -> str:
    """A call of a tool as one line of JSON, its arguments as an object where they are one."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"has a turn {number} with a call of a tool that has no name: {brief(call)}")
    meant = [("function", *CALL_NOTES), ("name", "arguments", *CALL_NOTES)]
    for node, known in zip([{} if function is call else call, function], meant, strict=True):
        extra = next((key for key in node if key not in known and not is_empty(node[key])), None)
        if extra is not None:
            raise DataError(f"has a turn {number} with {brief_text(extra)!r} in a call, which would not act here")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # what is no JSON stays the text that it is
            arguments = json.loads(arguments)
    return json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_trained(meant: Mapping[TurnMeaning, Mapping[str, Any]], speaker: str, number: int) -> bool:
    """Whether a turn says that it is trained on, or says nothing about it."""
    said: dict[str, bool] = {}
    for meaning, ordinary in ((TurnMeaning.TRAINED, True), (TurnMeaning.UNTRAINED, False)):
        for key, value in meant.get(meaning, {}).items():
            if not isinstance(value, bool | int | float) or value not in (0, 1):
                raise DataError(f'has "{key}" {brief(value)} in turn {number}; it may be 0 or 1, false or true')
            said[key] = bool(value) is ordinary
    if len(set(said.values())) > 1:
        raise DataError(f"has a turn {number} whose {' and '.join(map(repr, said))} contradict each other")
    if said and all(said.values()) and speaker not in (MODEL, CALL):
        raise DataError(
            f'has "{next(iter(said))}" in turn {number}, but only answers are trained on (--mask_question_tokens False '
            "trains a released model on all)"
        )
    return all(said.values())


def _system_of(turns: list[Turn]) -> tuple[str | None, list[Turn]]:
    """The text of the system turn that opens a conversation, and the other turns."""
    system, rest = None, turns
    if turns and turns[0].speaker == SYSTEM:
        system, rest = turns[0].text, turns[1:]
    late = next((turn for turn in rest if turn.speaker == SYSTEM), None)
    if late is not None:
        raise DataError(f"has a system turn {late.number}; only the first turn of a conversation may be one")
    return system, rest


def _same_side(turns: Sequence[Turn]) -> Iterator[list[Turn]]:
    """Turns that follow each other on one side, together where a tool takes part; else each for itself."""
    for _, group in groupby(turns, lambda turn: turn.speaker in (MODEL, CALL)):
        side = list(group)
        if any(turn.speaker in (TOOL, CALL) for turn in side):
            yield side
        else:
            yield from ([turn] for turn in side)


def _joined(turns: list[Turn]) -> Turn:
    """Turns of one side as one, a line break between them. Raises DataError if only some of them are trained on."""
    first, trained = turns[0], {turn.is_trained for turn in turns if turn.speaker in (MODEL, CALL)}
    if len(trained) > 1:
        raise DataError(f"has a turn {first.number} that is one answer with the next, of which only a part is trained")
    speaker = MODEL if first.speaker in (MODEL, CALL) else HUMAN
    text = "\n".join(turn.text for turn in turns)
    return Turn(first.number, speaker, text, [item for turn in turns for item in turn.shown], trained != {False})


def _as_llava(turn: Turn) -> dict[str, Any]:
    silent = {"train": False} if turn.speaker == MODEL and not turn.is_trained else {}
    return {"from": turn.speaker, "value": turn.text, **silent}


def _media_of(shown: Shown) -> dict[str, list[str]] | None:
    """The sources that parts name. Raises DataError if only some of them name one."""
    sources = [source for _, source in shown]
    if not any(source is not None for source in sources):
        return None
    if None in sources:
        raise DataError("has parts that show images or videos, of which only some say where they lie")
    return {name: [str(source) for modality, source in shown if modality == name] for name in MODALITIES}
