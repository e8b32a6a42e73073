# SPDX-License-Identifier: Apache-2.0
"""Images and videos that a record holds itself, as data URIs: `data:image/png;base64,iVBORw0…`."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
from typing import Any
from urllib.parse import unquote_to_bytes

from moellava.data.digests import digest_of
from moellava.errors import DataError

_URI = re.compile(r"data:(?P<mime>[^;,]*)(?P<options>[^,]*),", re.IGNORECASE)

_SIGNATURES = (
    (b"\x89PNG", 0, "image/png", ".png"),
    (b"\xff\xd8\xff", 0, "image/jpeg", ".jpg"),
    (b"GIF8", 0, "image/gif", ".gif"),
    (b"WEBP", 8, "image/webp", ".webp"),
    (b"BM", 0, "image/bmp", ".bmp"),
    (b"II*\x00", 0, "image/tiff", ".tiff"),
    (b"MM\x00*", 0, "image/tiff", ".tiff"),
    (b"ftypavif", 4, "image/avif", ".avif"),
    (b"ftyp", 4, "video/mp4", ".mp4"),
    (b"\x1aE\xdf\xa3", 0, "video/x-matroska", ".mkv"),
    (b"AVI ", 8, "video/x-msvideo", ".avi"),
)
"""(bytes, where they stand in the file, MIME type, ending of a file's name); the first that fits."""

TO_FILES = "`moellava convert-data --image-folder` writes a file for each"
"""The way out, where a file is needed."""

PART = "data:shard;"
"""How the path of a picture begins that lies in a shard: see `shard_parts.py`."""

_UNKNOWN = ("application/octet-stream", ".bin")


class Embedded(io.BytesIO):
    """The content of a data URI, open as a file is. As text it says what it is, for messages."""

    def __str__(self) -> str:
        return f"the embedded {mime_of(self.getvalue())} of {len(self.getvalue())} bytes"


def is_embedded(path: Any) -> bool:
    """Whether a path of a record is no path but the content itself."""
    return isinstance(path, str) and path[:5].lower() == "data:"


class Lying(str):
    """The data URI of a picture that can be read where it lies in its shard.

    Args:
        uri: of its content.
        place: in the shard; see `shard_parts.py`.
    """

    place: str

    def __new__(cls, uri: str, place: str) -> Lying:
        made = super().__new__(cls, uri)
        made.place = place
        return made

    @property
    def part(self) -> str:
        """What stands for it in the index of its shard."""
        return f"{PART}{self.place};{digest_of_held(self):016x}"


def is_part(path: Any) -> bool:
    """Whether a path of a record tells a picture in a shard."""
    return isinstance(path, str) and path.startswith(PART)


def digest_of_held(path: str) -> int:
    """64 bits of what a record holds itself, by its path: the same for a picture in a shard, wherever that lies."""
    return int(path[len(PART) :].split(";")[1], 16) if is_part(path) else digest_of(path.encode())


def data_uri(content: bytes) -> str:
    """The content of a file as a data URI."""
    return f"data:{mime_of(content)};base64,{base64.b64encode(content).decode('ascii')}"


def content_of(uri: str) -> bytes:
    """What a data URI holds. Raises DataError if it is not one, or broken."""
    head = _URI.match(uri)
    if head is None:
        raise DataError(f"an embedded file has no head like data:image/png;base64, … but {uri[:40]!r}")
    content = uri[head.end() :]
    if "base64" not in head["options"].lower():
        return unquote_to_bytes(content)
    packed = "".join(content.split())
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"an embedded file ({uri[: head.end()]}) is not valid base64: {error}") from error


def opened(uri: str) -> Embedded:
    """A data URI as an open file. Raises DataError: see `content_of`."""
    return Embedded(content_of(uri))


def mime_of(content: bytes) -> str:
    """The MIME type of a file by its first bytes."""
    return _signature(content)[0]


def file_name(content: bytes) -> str:
    """A name for an embedded file: of its content, so that the same image is one file."""
    return hashlib.sha256(content).hexdigest()[:24] + _signature(content)[1]


def _signature(content: bytes) -> tuple[str, str]:
    for bytes_, place, mime, ending in _SIGNATURES:
        if content[place : place + len(bytes_)] == bytes_:
            return mime, ending
    return _UNKNOWN
