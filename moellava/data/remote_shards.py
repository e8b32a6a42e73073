# SPDX-License-Identifier: Apache-2.0
"""Shards that lie elsewhere, tar and Parquet: read once, for their index, and from then on picture by picture.

In the index of such a shard a picture is told by where it lies in the shard, and by a digest of it:

    data:shard;1536+20480;0123456789abcdef      bytes of a tar file: where they begin, and how many they are
    data:shard;3.1;0123456789abcdef             one of row group 3 of a Parquet file, in its column 1

Of a record that is asked for, the address of its shard stands behind that. A tar file's picture is asked for by its
bytes; of Parquet, whose pictures are packed together, a row group is fetched at a time, and all of it is kept.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from moellava.data.cache import cache_folder
from moellava.data.embedded import PART, Part, digest_of_held, is_part
from moellava.data.fetched import FETCHED, LIMIT, keep_content, limit
from moellava.data.record_shape import paths_of
from moellava.data.remote import Distant, Span, copy_named, opened, state_told
from moellava.data.shards import MAGIC, MAGIC_PLACE, records_of_tar
from moellava.data.tables import as_json, needed, rows_of_group, table_problems
from moellava.log import get_logger

HEAD = 512
"""Bytes at a file's beginning that tell what it is."""

BLOCK = 8 * 2**20
"""Bytes that are fetched at a time while a shard is read from its beginning to its end."""

logger = get_logger(__name__)


class Shard(NamedTuple):
    """A shard that lies elsewhere.

    Attributes:
        url: its address.
        state: 64 bits of what the other side says of its content.
        size: bytes.
        read: (its address) -> its records, in which pictures are `Part`s.
    """

    url: str
    state: int
    size: int
    read: Callable[[str], Iterator[Any]]


def shard_at(url: str) -> Shard | None:
    """The shard at an address. None: the file there is copied as a whole. It is no shard, or packed; there is a copy of
    it; the other side gives no parts of files, or does not say when a file becomes another.

    Raises:
        UserError: see `opened`.
    """
    file_system, path = opened(url)
    try:
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
    return Shard(url, state, int(told["size"]), read)


def _head(file_system: Any, path: str) -> tuple[bytes, bool]:
    """The first bytes of a file, and whether others can be asked for by themselves. Raises OSError."""
    with file_system.open(path, "rb", block_size=HEAD, cache_type="none") as file:
        head = file.read(HEAD)
        try:
            file.seek(HEAD)
            return head, len(file.read(1)) == 1
        except (OSError, ValueError, NotImplementedError):
            return head, False


def _tar_rows(url: str) -> Iterator[Any]:
    def held(member: tarfile.TarInfo, content: bytes) -> str | None:
        place = f"{member.offset_data}+{member.size}"
        return part(place, content) if not member.issparse() else as_json(content)

    file_system, path = opened(url)
    with file_system.open(path, "rb", block_size=BLOCK, cache_type="readahead") as file:
        yield from records_of_tar(url, partial(tarfile.open, fileobj=file, mode="r|", bufsize=2**20), held)


def _parquet_rows(url: str) -> Iterator[Any]:
    parquet = needed("pyarrow.parquet", url)
    file_system, path = opened(url)
    with (
        table_problems(url, "Parquet"),
        file_system.open(path, "rb", block_size=BLOCK, cache_type="readahead") as file,
        parquet.ParquetFile(file) as table,
    ):
        names = table.schema_arrow.names
        for group in range(table.num_row_groups):
            holds = {name: partial(part, f"{group}.{number}") for number, name in enumerate(names)}
            for row in rows_of_group(table, group):
                yield {name: as_json(value, holds[name]) for name, value in row.items()}


READERS: tuple[tuple[bytes, int, Callable[[str], Iterator[Any]]], ...] = (
    (b"PAR1", 0, _parquet_rows),
    (MAGIC, MAGIC_PLACE, _tar_rows),
)
"""Bytes that a shard has in its head, where they stand, and what reads its records."""


def part(place: str, content: bytes) -> Part | None:
    """What stands for a picture in the index of its shard; None for an empty one, as in other tables."""
    return Part(f"{PART}{place};{digest_of_held(as_json(content)):016x}") if content else None


def with_address(record: dict[str, Any], url: str) -> dict[str, Any]:
    """A record of a shard's index, with the address of the shard behind what tells its pictures."""
    for modality in ("image", "video"):
        if any(map(is_part, paths_of(record, modality))):
            named = [f"{path};{url}" if is_part(path) else path for path in paths_of(record, modality)]
            record[modality] = named if isinstance(record[modality], list) else named[0]
    return record


class ShardPart(Distant):
    """A picture in a shard.

    Args:
        path: that a record has.
    """

    def __init__(self, path: str):
        self.place, digest, self.url = path[len(PART) :].split(";", 2)
        self.state = int(digest, 16)

    def __str__(self) -> str:
        return f"{self.url} ({self.place})"

    def span(self) -> Span | None:
        """The bytes of a tar file; None for Parquet."""
        begin, plus, size = self.place.partition("+")
        return Span(*opened(self.url), int(begin), int(begin) + int(size)) if plus else None

    def accepted(self, content: bytes) -> bytes:
        """See `Distant.accepted`."""
        if digest_of_held(as_json(content) or "") != self.state:
            raise OSError("the shard is another one than when it was read")
        return content

    def fetch(self) -> bytes:
        """See `Distant.fetch`. Of Parquet all others of the row group are kept, too."""
        if self.span() is not None:
            return super().fetch()
        found = dict(self._of_group())
        if self.state not in found:
            raise OSError("the shard is another one than when it was read")
        for state, content in found.items():
            if state != self.state:
                keep_content(state, content)
        return found[self.state]

    def _of_group(self) -> Iterator[tuple[int, bytes]]:
        """What a column of a row group holds, and the digest of each."""
        group, number = map(int, self.place.split("."))
        file_system, path = opened(self.url)
        parquet = needed("pyarrow.parquet", self.url)
        found: list[bytes] = []
        with file_system.open(path, "rb", block_size=BLOCK, cache_type="readahead") as file:
            with parquet.ParquetFile(file) as table:
                name = table.schema_arrow.names[number]
                for row in rows_of_group(table, group, [name]):
                    as_json(row[name], lambda content: found.append(content))
        for content in found:
            if content:
                yield digest_of_held(as_json(content)), content
