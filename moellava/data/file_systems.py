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
import zipfile
import zlib
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NamedTuple

from moellava.errors import UserError

ARCHIVES = 8
"""Archives that a process keeps open to read pictures from; of more, the one that was asked for longest ago goes."""

BROKEN = (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)
"""What is raised where an archive is not there, or damaged."""

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


def opened(url: str) -> tuple[Any, str]:
    """The file system of an address, and what it calls what lies there. Raises UserError: see `RemoteFolder`; or an
    archive is missing or damaged."""
    from fsspec.core import url_to_fs

    try:
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
    file_system, path, alone = held(inner)
    state = ""  # of none, which `opened` tells
    with alone, suppress(OSError):
        state = json.dumps(file_system.info(path), sort_keys=True, default=str)
    process = os.getpid()
    with _opening.setdefault(process, threading.Lock()):  # a fork may come while a thread of its parent opens one
        return _held(url, state, process)


def _is_kept(url: str) -> bool:
    """Whether `fsspec` keeps the file system of an address by itself; or does not know it, which `opened` tells."""
    from fsspec import get_filesystem_class

    try:
        return get_filesystem_class(re.split("::|://", url, maxsplit=1)[0]).cachable
    except (ImportError, ValueError):
        return True


_opening: dict[int, threading.Lock] = {}
"""Process -> what the thread has that opens an archive there."""


@functools.lru_cache(maxsize=ARCHIVES)
def _held(url: str, state: str, process: int) -> Held:
    return Held(*opened(url), threading.RLock())
