# SPDX-License-Identifier: Apache-2.0
"""Where in a shard a picture lies, so that it can be read without its neighbours.

1536+20480                          bytes of the file: where they begin, and how many they are
4+131080,snappy,196608,5120+99000   the same of bytes that snappy has packed; unpacked they are 196,608, and the
                                    picture is 99,000 of these
data-00000.arrow:1536+20480         of a file in a folder
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

from moellava.data.embedded import Lying, data_uri
from moellava.log import get_logger

SNAPPY = "snappy"

Held = Callable[[bytes, "Place | None"], str]
"""(a picture's content, its place) -> what its record has."""

_PLACE = re.compile(r"(?:([^:,]*):)?(\d+)\+(\d+)(?:,(\w+),(\d+),(\d+)\+(\d+))?")


class Place(NamedTuple):
    """Where a picture lies. As text it is what an index holds.

    Attributes:
        begin, size: bytes of the file.
        file: its name in a folder; '' where the shard is a file.
        codec: what has packed them; '': nothing.
        unpacked: how many they are unpacked.
        at, length: the picture among these.
    """

    begin: int
    size: int
    file: str = ""
    codec: str = ""
    unpacked: int = 0
    at: int = 0
    length: int = 0

    def __str__(self) -> str:
        file = f"{quote(self.file, safe='')}:" if self.file else ""
        packed = f",{self.codec},{self.unpacked},{self.at}+{self.length}" if self.codec else ""
        return f"{file}{self.begin}+{self.size}{packed}"

    def picture(self, content: bytes) -> bytes:
        """The picture in the bytes that are there. Raises OSError or ValueError where these are others."""
        if not self.codec:
            return content
        import pyarrow

        packed = _varint(self.unpacked) + content if self.codec == SNAPPY else content
        unpacked = pyarrow.Codec(self.codec).decompress(packed, self.unpacked)
        return unpacked.slice(self.at, self.length).to_pybytes()


def place_told(text: str) -> Place:
    """The place that a text tells."""
    match = _PLACE.fullmatch(text)
    assert match is not None, "readers of shards alone write places"
    file, begin, size, codec, *inside = match.groups()
    return Place(int(begin), int(size), unquote(file or ""), codec or "", *(int(number or 0) for number in inside))


def _varint(number: int) -> bytes:
    """A whole number, seven bits a byte, as snappy's streams begin with."""
    digits = bytearray()
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


@contextmanager
def holding(name: Path | str) -> Iterator[Held]:
    """Inside: what stands for the pictures of a shard. One without a place is its own content, and goes into the index;
    it is said how many these were.

    Args:
        name: of the shard.
    """
    without = 0

    def held(content: bytes, place: Place | None) -> str:
        nonlocal without
        if place is not None:
            return Lying(data_uri(content), str(place))
        without += 1
        return data_uri(content)

    yield held
    if without:
        why = "so packed that none can be read by itself: they go into the index"
        get_logger(__name__).info("%s: %d pictures are %s", name, without, why)
