# SPDX-License-Identifier: Apache-2.0
"""WebDataset shards: tar files in which the files of one name, side by side, are a record.

000017.json   {"conversations": …}          a record, or
000017.txt    A cat.                        what is said of the image
000017.jpg                                  its image; several: 000017.0.jpg, 000017.1.jpg
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moellava.constants import DEFAULT_IMAGE_TOKEN, ROLES
from moellava.data.embedded import data_uri
from moellava.data.json_lists import Broken, parsed
from moellava.data.record_keys import brief
from moellava.data.remote import open_file
from moellava.data.shard_places import Held, Place, holding
from moellava.data.unpacking import unpacked
from moellava.errors import DataError

if TYPE_CHECKING:
    from typing_extensions import Self  # `typing` has it from Python 3.11 on

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
CAPTIONS = ("txt", "caption")

MAGIC, MAGIC_PLACE = b"ustar", 257
"""What stands where in a tar file."""

BLOCK = 2**20
"""Bytes that are read at a time."""


def is_shard(path: Path, head: bytes) -> bool:
    """Whether a file is a tar file, also a packed one."""
    named = path.suffix in (".tar", ".tgz") or path.suffixes[-2:-1] == [".tar"]
    return named or head[MAGIC_PLACE : MAGIC_PLACE + len(MAGIC)] == MAGIC


class _Header(tarfile.TarInfo):
    """The header of a file in a shard. `tarfile` takes one that is damaged or missing for the shard's end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        """The next header. Raises ReadError where there should be one, and EOFHeaderError at the end of the shard."""
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            is_end = isinstance(error, tarfile.EOFHeaderError)  # type: ignore[attr-defined]
            if is_end or tar.offset == 0:  # what is wrong from its beginning is no tar file: `tarfile` says so
                raise
            raise tarfile.ReadError(f"it is cut short or damaged at byte {tar.offset} ({error})") from error


def shard_rows(name: Path | str) -> Iterator[Any]:
    """The records of a shard, here or elsewhere. Raises DataError if it cannot be read to its end."""
    try:
        with open_file(name) as file, unpacked(file) as content, holding(name) as held:
            with tarfile.open(fileobj=content, mode="r|", bufsize=BLOCK, tarinfo=_Header) as tar:
                for key, files in groupby(_files(tar, content is not file, held), lambda file: file[0]):
                    yield _record(key, [(ending, content) for _, ending, content in files])
                _require_end(tar)
    except tarfile.TarError as error:
        raise DataError(f"{name} is no tar file that can be read: {error}") from error


def _require_end(tar: tarfile.TarFile) -> None:
    """Raises ReadError where more follows the end of a shard than the zeros that fill its last block."""
    while block := tar.fileobj.read(BLOCK):
        if block.strip(b"\0"):
            raise tarfile.ReadError("more follows its end, as where two tar files were joined: list them one by one")


def _files(tar: tarfile.TarFile, is_packed: bool, held: Held) -> Iterator[tuple[str, str, bytes | Any]]:
    """(name up to its first dot, last ending, content, or what stands for an image) of each file, in order.

    Raises:
        ReadError: one is a link, so that a record would lose it.
    """
    for member in tar:
        folder, _, name = member.name.rpartition("/")
        if member.issym() or member.islnk():
            told = "pack what it leads to, as `tar --dereference --hard-dereference` does"
            raise tarfile.ReadError(f"{member.name} in it is a link: {told}")
        if member.isfile() and not name.startswith("."):
            file = tar.extractfile(member)
            stem, _, endings = name.partition(".")
            ending, content = endings.lower().rpartition(".")[2], file.read() if file else b""
            place = None if is_packed or member.issparse() else Place(member.offset_data, member.size)
            yield f"{folder}/{stem}".lstrip("/"), ending, held(content, place) if ending in IMAGES else content
        tar.members = []  # type: ignore[attr-defined]  # it keeps what it has come by: of a million files that is much


def _record(key: str, files: list[tuple[str, Any]]) -> Any:
    """A record of its files. What has another ending is a key of that name; none may come twice, saying two things."""
    record: dict[str, Any] = {}
    images = [content for ending, content in files if ending in IMAGES]
    for ending, content in files:
        if ending in IMAGES:
            continue
        try:
            said = _said(key, ending, content, len(images))
        except ValueError as error:
            return Broken(str(error), content.decode("utf-8-sig", "replace"))
        twice = next((name for name in said if name in record and record[name] != said[name]), None)
        if twice is not None:
            values = f"{brief(record[twice])} and {brief(said[twice])}"
            return Broken(f"has {brief(twice)} twice, in files of the name {key}: {values}; keep one", str(said))
        record |= said
    if images:
        record["image"] = images  # in place of the names that they had
    return {"id": key} | record


def _said(key: str, ending: str, content: bytes, images: int) -> dict[str, Any]:
    """What a file of a record says, by key. Raises ValueError where it is no JSON object and should be."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return {ending: data_uri(content)}
    if ending in CAPTIONS:
        said = (DEFAULT_IMAGE_TOKEN * images, text.strip())
        return {"conversations": [{"from": role, "value": words} for role, words in zip(ROLES, said, strict=True)]}
    if ending != "json":
        return {ending: text}
    try:
        value = parsed(text)
    except ValueError as error:
        raise ValueError(f"is not valid JSON ({key}.json): {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"is no JSON object ({key}.json): {brief(value)}")
    return value
