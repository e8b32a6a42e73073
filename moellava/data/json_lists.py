# SPDX-License-Identifier: Apache-2.0
"""JSON values out of texts, also out of a list that is larger than the memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, TextIO

BLOCK = 2**20
"""Characters that are read at once."""

_GOES_ON = 2
"""Characters behind a number that may be its own, if a digit follows in the next block: `e+`."""

_SPACE = re.compile(r"[ \t\n\r]*")


class Broken(NamedTuple):
    """A line that cannot be read, in its record's place.

    Attributes:
        problem: why, as the end of a sentence.
        text: what stands there.
    """

    problem: str
    text: str


def parsed(text: str) -> Any:
    """A JSON value. Raises ValueError where it is none, is nested too deeply, or names a key of an object twice."""
    value, end = decoded(text, len(text) - len(text.lstrip()))
    if text[end:].strip():
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def decoded(text: str, place: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at a place, and where it ends. Raises ValueError where there is none, it is nested too
    deeply, or names a key of an object twice."""
    try:
        return _DECODER.raw_decode(text, place)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"an object has the key {twice!r} twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def listed(file: TextIO) -> Iterator[Any]:
    """The values of a list that is all that a file holds, one by one.

    Raises:
        ValueError: it is no list, or a value of it is broken; also on the way.
    """
    window = _Window(file)
    window.take("[")
    if window.peek() == "]":
        window.take("]")
    else:
        yield window.value()
        while window.peek() == ",":
            window.take(",")
            if window.peek() == "]":
                raise window.error("Illegal trailing comma before end of array", window.place)
            yield window.value()
        window.take("]", or_else="Expecting ',' delimiter")
    if window.peek():
        raise window.error("Extra data", window.place)


class _Window:
    """The part of a file's text that is looked at. What has been read goes; where it broke is told in the file's terms.

    Attributes:
        text, place: what is held, and where in it reading goes on.
    """

    def __init__(self, file: TextIO):
        self._file = file
        self.text, self.place = "", 0
        self._characters = self._lines = self._line_begin = 0  # of what is gone

    def peek(self) -> str:
        """The next character that is no space; '' at the end."""
        while (end := _SPACE.match(self.text, self.place).end()) == len(self.text):  # type: ignore[union-attr]
            self.place = end
            if not self._grow(BLOCK):
                return ""
        self.place = end
        return self.text[end]

    def take(self, character: str, or_else: str = "Expecting value") -> None:
        """Goes past a character. Raises ValueError if another stands there."""
        if self.peek() != character:
            raise self.error(or_else, self.place)
        self.place += 1

    def value(self) -> Any:
        """Goes past a value. Raises ValueError if there is none."""
        self.peek()
        size = BLOCK
        while True:
            try:
                found, end = decoded(self.text, self.place)
            except json.JSONDecodeError as error:
                if not self._grow(size):
                    raise self.error(error.msg, error.pos) from error
            else:
                if end + _GOES_ON < len(self.text) or not self._grow(size):
                    self.place = end
                    return found
            size *= 2  # so that a value of many blocks is not begun many times

    def error(self, said: str, place: int) -> ValueError:
        """What is wrong at a place, as `json` says it."""
        line = self._lines + self.text.count("\n", 0, place)
        begin = self.text.rfind("\n", 0, place)
        column = place - begin if begin >= 0 else self._characters + place - self._line_begin + 1
        return ValueError(f"{said}: line {line + 1} column {column} (char {self._characters + place})")

    def _grow(self, size: int) -> bool:
        """Reads on, and forgets what has been read; False at the end of the file."""
        more = self._file.read(size)
        if not more:
            return False
        gone = self.text[: self.place]
        if (begin := gone.rfind("\n")) >= 0:
            self._line_begin = self._characters + begin + 1
        self._lines += gone.count("\n")
        self._characters += len(gone)
        self.text, self.place = self.text[self.place :] + more, 0
        return True
