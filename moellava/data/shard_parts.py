# SPDX-License-Identifier: Apache-2.0
"""Shards, here or elsewhere: read once, for their index, and from then on picture by picture.

In the index of a shard a picture is told by where it lies in it (`shard_places.py`), and by a digest of it:

    data:shard;1536+20480;0123456789abcdef

Of a record that is asked for, the path or the address of its shard stands behind that. A picture that lies here is read
as one in a file of its own is; one that lies elsewhere is fetched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from moellava.data.cache import cache_folder
from moellava.data.embedded import PART, data_uri, digest_of_held, is_part
from moellava.data.fetched import FETCHED, LIMIT, limit
from moellava.data.file_systems import held, opened, reaching
from moellava.data.record_shape import with_paths
from moellava.data.remote import Distant, Span, copy_named, is_remote, state_told
from moellava.data.shard_places import place_told
from moellava.data.shards import MAGIC, MAGIC_PLACE, shard_rows
from moellava.data.tables import parquet_rows
from moellava.log import get_logger

HEAD = 512
"""Bytes at a file's beginning that tell what it is."""

logger = get_logger(__name__)


class Shard(NamedTuple):
    """A shard that lies elsewhere.

    Attributes:
        url: its address.
        state: 64 bits of what the other side says of its content.
        read: (its address) -> its records.
    """

    url: str
    state: int
    read: Callable[[str], Iterator[Any]]


def shard_at(url: str) -> Shard | None:
    """The shard at an address. None: the file there is copied as a whole. It is no shard, or packed; there is a copy of
    it; the other side gives no parts of files, or does not say when a file becomes another.

    Raises:
        UserError: see `opened`.
    """
    file_system, path = opened(url)
    try:
        with reaching():
            told = file_system.info(path)
            head, has_parts = _head(file_system, path)
    except (OSError, ValueError, NotImplementedError):  # whoever copies it says why
        return None
    read = next((read for magic, place, read in READERS if head[place : place + len(magic)] == magic), None)
    folder, state = cache_folder(), state_told(url, told)
    if read is None or folder is None or (state and (folder / copy_named(url, state)).is_dir()):
        return None
    if not has_parts or not state:
        why = "does not tell when it changes" if has_parts else "gives no parts of files"
        logger.info("%s is copied as a whole, for the other side %s", url, why)
        return None
    logger.info(
        "%s is read once; its pictures are fetched when they are shown, and kept in %s up to %.0f GB (%s)",
        url, folder / FETCHED, limit() / 1e9, LIMIT,
    )  # fmt: skip
    return Shard(url, state, read)


def _head(file_system: Any, path: str) -> tuple[bytes, bool]:
    """The first bytes of a file, and whether others can be asked for by themselves. Raises OSError."""
    with file_system.open(path, "rb", block_size=HEAD, cache_type="none") as file:
        head = file.read(HEAD)
        try:
            file.seek(HEAD)
            return head, len(file.read(1)) == 1
        except (OSError, ValueError, NotImplementedError):
            return head, False


READERS: tuple[tuple[bytes, int, Callable[[str], Iterator[Any]]], ...] = (
    (b"PAR1", 0, parquet_rows),
    (MAGIC, MAGIC_PLACE, shard_rows),
)
"""Of shards that are read where they lie elsewhere: bytes that they have in their head, where they stand, and what
reads their records."""


def with_address(record: dict[str, Any], lies: str) -> dict[str, Any]:
    """A record of an index, with the path or the address of its shard behind what tells its pictures."""
    return with_paths(record, lambda path: f"{path};{lies}" if is_part(path) else path)


def with_pictures(record: dict[str, Any]) -> dict[str, Any]:
    """A record with its pictures in the place of what tells where they lie in a shard. Raises BadFileError."""
    return with_paths(record, lambda path: data_uri(ShardPart(path).fetched().getvalue()) if is_part(path) else path)


class ShardPart(Distant):
    """A picture in a shard.

    Args:
        path: that a record has.
    """

    def __init__(self, path: str):
        place, digest, self.shard = path[len(PART) :].split(";", 2)
        self.place, self._digest = place_told(place), int(digest, 16)
        self.is_near = not is_remote(self.shard)
        self.state = 0 if self.is_near else self._digest

    def __str__(self) -> str:
        return f"{self.shard} ({self.place})"

    def span(self) -> Span:
        """See `Distant.span`."""
        begin, end = self.place.begin, self.place.begin + self.place.size
        if self.is_near:
            file = os.path.join(self.shard, self.place.file) if self.place.file else self.shard
            return Span(None, file, begin, end)
        file_system, path, alone = held(self.shard)
        return Span(file_system, path, begin, end, alone)

    def accepted(self, content: bytes) -> bytes:
        """The picture in what was fetched. Raises OSError where it is another one."""
        try:
            picture = self.place.picture(content)
        except (OSError, ValueError) as error:
            raise OSError(f"{CHANGED} ({error})") from error
        if digest_of_held(data_uri(picture)) != self._digest:
            raise OSError(CHANGED)
        return picture


CHANGED = "the shard is another one than when it was read"
