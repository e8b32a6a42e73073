# SPDX-License-Identifier: Apache-2.0
"""Where in a Parquet file the values of its columns of bytes lie.

A column's part of a row group is pages, one behind the other, each with a head in Thrift's compact protocol
(`PageHeader` of https://github.com/apache/parquet-format). Values stand in pages of data, or, each once, in the page in
front of them, as length (4 bytes), content, length, content, …; and a page is packed as a whole.

Snappy, with which most writers pack, cuts what it packs into blocks of 64 KiB that know nothing of each other: those
that hold a value can be unpacked by themselves, however large their page is. Of what is packed otherwise, a page is.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple

from moellava.data.shard_places import SNAPPY, Place

BLOCK = 2**16
"""Bytes that snappy packs by themselves."""

WORTH_CUTTING = 4 * BLOCK
"""Bytes of a page that snappy has packed above which it is looked for where its blocks begin."""

BESIDE = 2**21
"""Bytes that may have to be unpacked beside a picture. One that would take more has no place: to read it from there
would take longer than to read it from an index."""

CODECS = {"UNCOMPRESSED": "", "SNAPPY": SNAPPY, "GZIP": "gzip", "ZSTD": "zstd", "BROTLI": "brotli"}
"""Parquet's names of packings that are looked into -> pyarrow's."""

DATA, DICTIONARY, DATA_V2 = 0, 2, 3
"""Types of pages."""

PLAIN, PLAIN_DICTIONARY = 0, 2
"""Encodings: values as they are; in the page in front of the others its old name says the same."""

NOT_UNDERSTOOD = (ArithmeticError, LookupError, MemoryError, OSError, RecursionError, TypeError, ValueError)
"""What pages raise that are damaged, or hold what is not looked into here: they have no places."""

Key = tuple[int, int]


class Page(NamedTuple):
    """A page with values as they are.

    Attributes:
        begin, end: what is packed, in its column's part of the row group.
        codec: what has packed it; '': nothing.
        size: bytes, unpacked.
        levels: how many of its numbers (what is null, and where lists begin) stand before the values, packed with them.
    """

    begin: int
    end: int
    codec: str
    size: int
    levels: int


def key_of(content: bytes) -> Key:
    """What a content is found by, within one process."""
    return len(content), hash(content)


class Twice:
    """A file some parts of which `pyarrow` reads a second time: a column's part of a row group, or several of them.

    Args:
        file: open, and can be sought in.
    """

    closed = False

    def __init__(self, file: Any):
        self.file = file
        self.seek, self.tell = file.seek, file.tell
        self.parts: dict[int, bytes] = {}

    def part(self, begin: int, size: int) -> bytes:
        """Bytes that will be asked for again."""
        self.file.seek(begin)
        self.parts[begin] = content = self.file.read(size)
        return content

    def read(self, size: int = -1) -> bytes:
        """As a file does."""
        place, pieces = self.file.tell(), []
        end = place + size
        for begin, part in sorted(self.parts.items()):
            if place <= begin and begin + len(part) <= end:
                pieces += [self.file.read(begin - place), part]
                place = self.file.seek(begin + len(part))
        pieces.append(self.file.read(end - place if size >= 0 else -1))
        filled = [piece for piece in pieces if piece]
        return filled[0] if len(filled) == 1 else b"".join(filled)


def places_of_group(file: Twice, metadata: Any, group: int) -> dict[Key, Place]:
    """The places of a row group's values of bytes, by the keys of their contents.

    Args:
        file: of Parquet.
        metadata: of the file, as `pyarrow` has it.
        group: its number.
    """
    places: dict[Key, Place] = {}
    file.parts.clear()
    for number in range(metadata.num_columns):
        column, schema = metadata.row_group(group).column(number), metadata.schema.column(number)
        is_bytes = schema.physical_type == "BYTE_ARRAY" and schema.logical_type.type == "NONE"
        if not is_bytes or column.compression not in CODECS:
            continue
        begin = min(column.dictionary_page_offset or column.data_page_offset, column.data_page_offset)
        chunk = file.part(begin, column.total_compressed_size)
        levels = (schema.max_repetition_level > 0) + (schema.max_definition_level > 0)
        try:
            for page in _pages(chunk, CODECS[column.compression], levels):
                places |= {key: place._replace(begin=begin + place.begin) for key, place in _places(chunk, page)}
        except NOT_UNDERSTOOD:  # who reads the rows says what is wrong with it, if something is
            continue
    return places


def _pages(chunk: bytes, codec: str, levels: int) -> Iterator[Page]:
    """The pages of a column's part of a row group that hold values as they are. `codec`, `levels`: see `Page`."""
    place = 0
    while place < len(chunk):
        head, begin = _struct(chunk, place)
        place = begin + head[3]
        if head[2] < 0 or head[3] < 0:
            raise ValueError("a page of less than nothing")
        if head[1] == DICTIONARY and head[7][2] in (PLAIN, PLAIN_DICTIONARY):
            yield Page(begin, place, codec, head[2], 0)
        elif head[1] == DATA and head[5][2] == PLAIN:
            yield Page(begin, place, codec, head[2], levels)
        elif head[1] == DATA_V2 and head[8][4] == PLAIN:
            front = head[8][5] + head[8][6]  # bytes of the same numbers, which are not packed here
            yield Page(begin + front, place, codec if head[8].get(7, True) else "", head[2] - front, 0)


def _places(chunk: bytes, page: Page) -> Iterator[tuple[Key, Place]]:
    """The keys and places of a page's values, in its column's part of the row group."""
    import pyarrow

    packed = memoryview(chunk)[page.begin : page.end]
    content = memoryview(pyarrow.Codec(page.codec).decompress(packed, page.size)) if page.codec else packed
    at = 0
    for _ in range(page.levels):
        at += 4 + int.from_bytes(content[at : at + 4], "little")
    borders = _borders(packed, page)
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "little")
        at += 4
        value = bytes(content[at : at + length])
        if value and not page.codec:
            yield key_of(value), Place(page.begin + at, length)
        elif value:
            before = borders[bisect_right(borders, (at, len(packed))) - 1]
            after = borders[bisect_left(borders, (at + length, 0))]
            if after[0] - before[0] - length <= BESIDE:
                inside = page.codec, after[0] - before[0], at - before[0], length
                yield key_of(value), Place(page.begin + before[1], after[1] - before[1], "", *inside)
        at += length


def _borders(packed: memoryview, page: Page) -> list[tuple[int, int]]:
    """Where a page can be cut: (bytes before it unpacked, and packed), its begin and end among them."""
    begin = 0
    if page.codec == SNAPPY:
        while packed[begin] & 128:  # the size, before the stream
            begin += 1
        begin += 1
        if page.size > WORTH_CUTTING:
            return _blocks(packed, begin)
    return [(0, begin), (page.size, len(packed))]


def _blocks(packed: memoryview, at: int) -> list[tuple[int, int]]:
    """Where a snappy stream can be cut: between blocks, unless one refers back to another. `at`: where it begins.

    An element is a tag and what it tells: bytes themselves, or how far back they stand and how many they are
    (https://github.com/google/snappy/blob/main/format_description.txt).
    """
    size, found, end = 0, [(0, at)], len(packed)
    while at < end:
        tag = packed[at]
        if tag & 3 == 0:
            length, more = tag >> 2, max((tag >> 2) - 59, 0)
            if more:
                length = int.from_bytes(packed[at + 1 : at + 1 + more], "little")
            length += 1
            at += 1 + more + length
        else:
            wide = (1, 2, 4)[(tag & 3) - 1]
            back = int.from_bytes(packed[at + 1 : at + 1 + wide], "little")
            length = (tag >> 2) + 1
            if wide == 1:
                length, back = (tag >> 2 & 7) + 4, back | tag >> 5 << 8
            at += 1 + wide
            while found[-1][0] > size - back:
                found.pop()
        size += length
        if size % BLOCK == 0 or at == end:
            found.append((size, at))
    return found


def _struct(content: bytes, at: int) -> tuple[dict[int, Any], int]:
    """A structure of Thrift's compact protocol: its fields by their numbers, and where it ends.

    Raises:
        ValueError: it has what heads of pages do not have.
    """
    fields: dict[int, Any] = {}
    number = 0
    while type_ := content[at]:
        at += 1
        step, type_ = type_ >> 4, type_ & 15
        if not step:
            raw, at = _number(content, at)
        number = number + step if step else raw >> 1 ^ -(raw & 1)
        if type_ in (1, 2):
            fields[number] = type_ == 1
        elif type_ in (4, 5, 6):
            raw, at = _number(content, at)
            fields[number] = raw >> 1 ^ -(raw & 1)
        elif type_ == 8:
            length, at = _number(content, at)
            at += length
        elif type_ == 12:
            fields[number], at = _struct(content, at)
        else:
            raise ValueError(f"a page's head has a field of type {type_}")
    return fields, at + 1


def _number(content: bytes, at: int) -> tuple[int, int]:
    """A whole number of seven bits a byte, and where it ends."""
    number = shift = 0
    while True:
        number |= (content[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if content[at - 1] < 128:
            return number, at
