# SPDX-License-Identifier: Apache-2.0
"""WebDataset shards: tar files in which the files of one name, side by side, are a record.

000017.json   {"conversations": …}          a record, or
000017.txt    A cat.                        what is said of the image
000017.jpg                                  its image; several: 000017.0.jpg, 000017.1.jpg
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from moellava.constants import DEFAULT_IMAGE_TOKEN, ROLES
from moellava.data.embedded import data_uri
from moellava.data.json_lists import Broken, parsed
from moellava.data.record_keys import brief
from moellava.errors import DataError

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
CAPTIONS = ("txt", "caption")

MAGIC, MAGIC_PLACE = b"ustar", 257
"""What stands where in a tar file."""


def is_shard(path: Path, head: bytes) -> bool:
    """Whether a file is a tar file, also a packed one."""
    named = path.suffix in (".tar", ".tgz") or path.suffixes[-2:-1] == [".tar"]
    return named or head[MAGIC_PLACE : MAGIC_PLACE + len(MAGIC)] == MAGIC


def shard_rows(path: Path) -> Iterator[Any]:
    """The records of a shard; images in it become data URIs. Raises DataError if it cannot be read to its end."""
    return records_of_tar(path, lambda: tarfile.open(path, "r|*"), lambda _, content: data_uri(content))


def records_of_tar(
    name: Path | str, open_: Callable[[], tarfile.TarFile], held: Callable[[tarfile.TarInfo, bytes], Any]
) -> Iterator[Any]:
    """The records of a shard.

    Args:
        name: of the shard, for messages.
        open_: opens it, to be read from its beginning to its end.
        held: what stands in a record for an image.

    Raises:
        DataError: it cannot be read to its end.
    """
    try:
        with open_() as tar:
            for key, files in groupby(_files(tar, held), lambda file: file[0]):
                yield _record(key, [(ending, content) for _, ending, content in files])
    except tarfile.TarError as error:
        raise DataError(f"{name} is no tar file that can be read: {error}") from error


def _files(
    tar: tarfile.TarFile, held: Callable[[tarfile.TarInfo, bytes], Any]
) -> Iterator[tuple[str, str, bytes | Any]]:
    """(name up to its first dot, last ending, content, or what stands for an image) of each file, in order."""
    for member in tar:
        folder, _, name = member.name.rpartition("/")
        if member.isfile() and not name.startswith("."):
            file = tar.extractfile(member)
            stem, _, endings = name.partition(".")
            ending, content = endings.lower().rpartition(".")[2], file.read() if file else b""
            yield f"{folder}/{stem}".lstrip("/"), ending, held(member, content) if ending in IMAGES else content
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
