# SPDX-License-Identifier: Apache-2.0
"""`fsspec`'s file systems by address, those inside an archive open from one question to the next."""

from __future__ import annotations

import functools
import json
import lzma
import os
import re
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

from moellava.errors import UserError

ARCHIVES = 8
"""Archives that a process keeps open to read pictures from; of more, the one that was asked for longest ago goes."""

BELIEVED = 1.0
"""Seconds for which what another machine has said of an archive holds: asking takes as long as a picture does."""

AHEAD = 64 * 2**10
"""Bytes that are fetched beyond what is read of an archive elsewhere: some pictures, or most of one. `fsspec` fetches 5
or 50 megabytes, which is right for a file that is read from its beginning to its end."""

WHOLE = 4 * 2**20
"""Bytes of an archive elsewhere that is kept in memory."""

BROKEN = (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)
"""What is raised where an archive is not there, or damaged."""


class UnreachableError(OSError):
    """The other side was not asked: there is no connection, or nothing that says who asks."""


TOGETHER: AbstractContextManager[Any] = nullcontext()
"""Of a file system that several threads may ask at a time."""


class Held(NamedTuple):
    """A file system that may be asked again and again.

    Attributes:
        file_system: of `fsspec`.
        root: what it calls what lies at an address.
        alone: to be entered while it is asked: one of an archive has one place at which it reads.
    """

    file_system: Any
    root: str
    alone: AbstractContextManager[Any]


@contextmanager
def reaching() -> Iterator[None]:
    """Inside, what packages below `fsspec` raise in classes of their own is an UnreachableError; so is the absence of a
    file that is told because nobody answered, as `fsspec` has it of HTTP."""
    try:
        yield
    except (*BROKEN, ValueError, RuntimeError) as error:
        if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, OSError):
            raise UnreachableError(str(error.__cause__)) from error
        raise
    except Exception as error:
        if type(error).__module__ == "builtins":  # a fault of this package
            raise
        raise UnreachableError(f"{type(error).__name__}: {error}") from error


def opened(url: str) -> tuple[Any, str]:
    """The file system of an address, and what it calls what lies there. Raises UserError: see `RemoteFolder`; or an
    archive is missing or damaged."""
    from fsspec.core import url_to_fs

    try:
        with reaching():
            return url_to_fs(url)
    except ImportError as error:
        needed = getattr(error.__cause__ or error, "name", None) or "a package"
        raise UserError(f"{url}: such addresses need {needed}: pip install {needed} ({error})") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}") from error
    except BROKEN as error:  # an archive is read when it is opened
        raise UserError(f"{url} cannot be opened: {error or type(error).__name__}") from error


def held(url: str) -> Held:
    """The same as `opened`, of an archive the one that this process has open while the archive stays as it is.

    `fsspec` keeps file systems but for those: each time it would read what is in the archive, all of it.
    """
    inner = url.partition("::")[2]
    if not inner or _is_kept(url):
        return Held(*opened(url), TOGETHER)
    state, process = _state(inner), os.getpid()
    with _opening.setdefault(process, threading.Lock()):  # a fork may come while a thread of its parent opens one
        return _held(url, state, process)


def _is_kept(url: str) -> bool:
    """Whether `fsspec` keeps the file system of an address by itself; or does not know it, which `opened` tells."""
    from fsspec import get_filesystem_class

    try:
        return get_filesystem_class(re.split("::|://", url, maxsplit=1)[0]).cachable
    except (ImportError, ValueError):
        return True


def _state(inner: str) -> str:
    """What is said of an archive at an address; nothing of none, which `opened` tells."""
    from fsspec.archive import AbstractArchiveFileSystem
    from fsspec.implementations.local import LocalFileSystem

    asked = held(inner)
    if isinstance(asked.file_system, LocalFileSystem | AbstractArchiveFileSystem):
        return _told(asked)
    return _told_lately(inner, int(time.monotonic() / BELIEVED))


def _told(asked: Held) -> str:
    with asked.alone, suppress(OSError), reaching():
        return json.dumps(asked.file_system.info(asked.root), sort_keys=True, default=str)
    return ""


@functools.lru_cache(maxsize=ARCHIVES)
def _told_lately(inner: str, moment: int) -> str:
    return _told(held(inner))


_opening: dict[int, threading.Lock] = {}
"""Process -> what the thread has that opens an archive there."""


@functools.lru_cache(maxsize=ARCHIVES)
def _held(url: str, state: str, process: int) -> Held:
    file_system, root = opened(url)
    _read_little_ahead(file_system)
    return Held(file_system, root, threading.RLock())


def _read_little_ahead(archive: Any) -> None:
    """Has an archive that lies elsewhere, and is open, fetch about what is read of it, here and there; a small one is
    fetched as a whole, also from a server that gives no parts. What it was opened with has come in large pieces."""
    from fsspec.caching import caches
    from fsspec.spec import AbstractBufferedFile

    file = getattr(archive, "fo", None)
    if isinstance(file, AbstractBufferedFile):
        way = "all" if file.size <= WHOLE else "readahead"
        file.cache = caches[way](AHEAD, file.cache.fetcher, file.size)
