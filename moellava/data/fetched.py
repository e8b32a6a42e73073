# SPDX-License-Identifier: Apache-2.0
"""What has been fetched from elsewhere, kept on this machine's disk up to a limit; the oldest goes first.

All processes and workers of a machine share it. Each of its 256 folders has its even share of the limit, so that nobody
has to know more of it than what lies beside a file that he writes.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from contextlib import suppress
from pathlib import Path

from moellava.data.cache import cache_folder
from moellava.data.digests import digest_of
from moellava.errors import UserError
from moellava.log import get_logger

LIMIT = "MOELLAVA_FETCHED_GB"
"""The environment variable that says how much is kept, in GB (10^9 bytes); 0: nothing."""

USUAL_LIMIT = 10.0

FETCHED = "fetched"
"""The folder of the cache."""

FOLDERS = 256

DIGEST = 8
"""Bytes in front of a file's content, of which they are a digest: a machine that fails may leave half of a file."""

LOOKED_AFTER = 16
"""Of so many files that are written to a folder, one has the others counted."""


def limit() -> float:
    """Bytes that are kept. Raises UserError where the environment says no number."""
    said = os.environ.get(LIMIT, "")
    try:
        value = float(said or USUAL_LIMIT)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(f"{LIMIT}={said}: a number of GB is 0 or more.")
    return value * 1e9


def kept_content(key: int) -> bytes | None:
    """What is kept under a number of 64 bits; None where nothing is. 0 stands for nothing."""
    path = _path(key)
    try:
        written = b"" if path is None else path.read_bytes()
    except OSError:  # it was never there, or somebody else has just made room
        return None
    content = written[DIGEST:]
    return content if written[:DIGEST] == _digest(content) else None


def is_kept(key: int) -> bool:
    """Whether something is kept under a number."""
    path = _path(key)
    return path is not None and path.is_file()


def keep_content(key: int, content: bytes) -> None:
    """Keeps a content under a number, and lets the oldest of others go where there are too many."""
    path = _path(key)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        temporary.write_bytes(_digest(content) + content)
        os.replace(temporary, path)
        if key // FOLDERS % LOOKED_AFTER == 0:
            _make_room(path.parent, limit() / FOLDERS)
    except OSError as error:
        _tell(path.parent.parent, str(error.strerror))


def _digest(content: bytes) -> bytes:
    return digest_of(content).to_bytes(DIGEST, "big")


def _path(key: int) -> Path | None:
    folder = cache_folder() if key and limit() else None
    return None if folder is None else folder / FETCHED / f"{key % FOLDERS:02x}" / f"{key:016x}"


def _make_room(folder: Path, most: float) -> None:
    """Removes the oldest files of a folder until the others are no more than so many bytes."""
    files: list[tuple[float, int, str]] = []
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):  # another process makes room, too
            state = entry.stat()
            files.append((state.st_mtime, state.st_size, entry.path))
    size = sum(size for _, size, _ in files)
    for _, own, path in sorted(files):
        if size <= most:
            break
        Path(path).unlink(missing_ok=True)
        size -= own


@functools.cache
def _tell(folder: Path, why: str) -> None:
    get_logger(__name__).warning("%s cannot be written (%s): what is fetched is fetched again each time", folder, why)
