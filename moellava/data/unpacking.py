# SPDX-License-Identifier: Apache-2.0
"""Files that are packed as a whole, read as if they were not."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

UNPACK: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x5d\x00\x00\x80": lzma.open,
}
"""First bytes of a packed file -> what opens it. Each tells a file that is cut short or damaged."""


@contextmanager
def unpacked(file: IO[bytes]) -> Iterator[Any]:
    """Inside: the content of an open file, which is at its beginning; the file itself where nothing has packed it.

    Reading it raises EOFError where the file is cut short, and OSError, zlib.error or LZMAError where it is damaged.
    """
    head = file.read(max(map(len, UNPACK)))
    file.seek(0)
    unpack = next((unpack for magic, unpack in UNPACK.items() if head.startswith(magic)), None)
    if unpack is None:
        yield file
    else:
        with unpack(file) as content:
            yield content
