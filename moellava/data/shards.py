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
from typing import Any

from moellava.constants import DEFAULT_IMAGE_TOKEN, ROLES
from moellava.data.embedded import data_uri
from moellava.data.json_lists import Broken, parsed
from moellava.data.record_keys import brief
from moellava.data.remote import open_file
from moellava.data.shard_places import Held, Place, holding
from moellava.errors import DataError

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


def shard_rows(name: Path | str) -> Iterator[Any]:
    """The records of a shard, here or elsewhere. Raises DataError if it cannot be read to its end."""
    try:
        with open_file(name) as file, holding(name) as held:
            is_packed = _is_packed(file)
            with tarfile.open(fileobj=file, mode="r|*" if is_packed else "r|", bufsize=BLOCK) as tar:
                for key, files in groupby(_files(tar, is_packed, held), lambda file: file[0]):
                    yield _record(key, [(ending, content) for _, ending, content in files])
    except tarfile.TarError as error:
        raise DataError(f"{name} is no tar file that can be read: {error}") from error


def _is_packed(file: Any) -> bool:
    """Whether a tar file is packed as a whole. It is at its beginning, and is so afterwards."""
    try:
        with tarfile.open(fileobj=file, mode="r|", bufsize=tarfile.BLOCKSIZE):
            return False
    except tarfile.ReadError:
        return True
    finally:
        file.seek(0)


def _files(tar: tarfile.TarFile, is_packed: bool, held: Held) -> Iterator[tuple[str, str, bytes | Any]]:
    """(name up to its first dot, last ending, content, or what stands for an image) of each file, in order."""
    for member in tar:
        folder, _, name = member.name.rpartition("/")
        if member.isfile() and not name.startswith("."):
            file = tar.extractfile(member)
            stem, _, endings = name.partition(".")
            ending, content = endings.lower().rpartition(".")[2], file.read() if file else b""
            place = None if is_packed or member.issparse() else Place(member.offset_data, member.size)
            yield f"{folder}/{stem}".lstrip("/"), ending, held(content, place) if ending in IMAGES else content
        tar.members = []  # type: ignore[attr-defined]  # it keeps what it has come by: of a million files that is much


def _record(key: str, files: list[tuple[str, Any]]) -> Any:
    """A record of its files. What has another ending is a key of that name."""
    record: dict[str, Any] = {"id": key}
    images = [content for ending, content in files if ending in IMAGES]
    for ending, content in files:
        if ending in IMAGES:
            continue
        try:
            text = content.decode("utf-8-sig")
            value = parsed(text) if ending == "json" else text
        except UnicodeDecodeError:
            record[ending] = data_uri(content)
            continue
        except ValueError as error:
            return Broken(f"is not valid JSON ({key}.json): {error}", text)
        if ending == "json":
            if not isinstance(value, dict):
                return Broken(f"is no JSON object ({key}.json): {brief(value)}", text)
            record |= value
        elif ending in CAPTIONS:
            said = (DEFAULT_IMAGE_TOKEN * len(images), text.strip())
            record["conversations"] = [{"from": role, "value": words} for role, words in zip(ROLES, said, strict=True)]
        else:
            record[ending] = text
    if images:
        record["image"] = images  # in place of the names that they had
    return record
