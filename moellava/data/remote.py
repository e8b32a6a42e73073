# SPDX-License-Identifier: Apache-2.0
"""Data that lie elsewhere: `s3://…`, `gs://…`, `hf://…`, `http://…`, whatever `fsspec` opens.

A data file is copied into the cache once, by what the other side says of its content, and its index is made of the
copy. Pictures are fetched when they are shown. Of these no more is looked at before a run than that they are there, by
the list of their folder where the other side has one.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
from pathlib import Path
from typing import Any

import numpy as np

from moellava.data.cache import PLACE, cache_folder, kept
from moellava.data.embedded import Embedded
from moellava.data.remembered import Remembered
from moellava.data.skip_lists import digest_of
from moellava.errors import BadFileError, DataError, UserError

_URL = re.compile(r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://", re.IGNORECASE)

FOLDERS_KEPT = 1024
"""Folders whose lists are remembered."""

COPIES = "copies"
"""The folder of the cache for data files."""

SAYS_NOTHING = {"name", "size", "type", "mimetype", "url", "partial", "StorageClass", "Key", "Size", "islink"}
"""What a file system says of a file that stays as it is when a file of the same size takes its place."""


class Fetched(Embedded):
    """The content of a file that lies elsewhere. As text it says where."""

    def __init__(self, content: bytes, url: str):
        super().__init__(content)
        self.url = url

    def __str__(self) -> str:
        return self.url


class RemoteFile:
    """A file that lies elsewhere. As text it says where.

    Args:
        folder: that its path is relative to.
        path: as its record has it.
    """

    def __init__(self, folder: RemoteFolder, path: str):
        self.folder, self.path = folder, path

    def __str__(self) -> str:
        return f"{self.folder}/{self.path}"

    def read_bytes(self) -> bytes:
        """Its content. Raises OSError."""
        return self.folder.file_system.cat_file(self.folder.path_of(self.path))

    def fetched(self) -> Fetched:
        """Its content, to be decoded. Raises BadFileError where it cannot be read."""
        try:
            return Fetched(self.read_bytes(), str(self))
        except (OSError, ValueError) as error:
            raise BadFileError(f"{self}: the file cannot be read: {error or type(error).__name__}") from error

    @property
    def state(self) -> int | None:
        """64 bits of what the other side says of its content; 0 where it says nothing, None where there is no file."""
        return self.folder.state(self.path)


class RemoteFolder:
    """A folder that lies elsewhere.

    Args:
        url: of the folder.

    Raises:
        UserError: `fsspec` does not know such addresses, or a package that it needs for them is not installed.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        _, self._root = opened(self.url)
        self._lists = Remembered(self._list, FOLDERS_KEPT)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, path: str) -> RemoteFile | Path:
        return Path(path) if os.path.isabs(path) else RemoteFile(self, path)

    @property
    def file_system(self) -> Any:
        """Asked for anew each time: a connection does not survive a fork, and `fsspec` keeps one for each process."""
        return opened(self.url)[0]

    def path_of(self, path: str) -> str:
        """What the file system calls a file."""
        return posixpath.normpath(f"{self._root}/{path}") if "://" not in self._root else f"{self._root}/{path}"

    def state(self, path: str) -> int | None:
        """See `RemoteFile.state`."""
        whole = self.path_of(path)
        names, states = self._lists(posixpath.dirname(whole))
        name = np.uint64(digest_of(posixpath.basename(whole).encode("utf-8", "surrogateescape")))
        place = int(np.searchsorted(names, name))
        if place < len(names) and names[place] == name:
            return int(states[place])
        try:
            return _state(self.url, self.file_system.info(whole))
        except (OSError, ValueError):
            return None

    def _list(self, folder: str) -> tuple[np.ndarray, np.ndarray]:
        """Digests of the names of a folder's files, sorted, and their states."""
        try:
            entries = self.file_system.ls(folder, detail=True)
        except (OSError, ValueError, NotImplementedError):  # a server that lists nothing: each file is asked for
            entries = []
        names = [posixpath.basename(one["name"]).encode("utf-8", "surrogateescape") for one in entries]
        digests = np.array([digest_of(name) for name in names], np.uint64)
        states = np.array([_state(self.url, one) for one in entries], np.uint64)
        order = np.argsort(digests)
        return digests[order], states[order]


def is_remote(name: object) -> bool:
    """Whether a name is an address: `protocol://…`."""
    return bool(_URL.match(str(name)))


def opened(url: str) -> tuple[Any, str]:
    """The file system of an address, and what it calls what lies there. Raises UserError: see `RemoteFolder`."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except ImportError as error:
        needed = getattr(error.__cause__ or error, "name", None) or "a package"
        raise UserError(f"{url}: such addresses need {needed}: pip install {needed} ({error})") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}") from error


def copied(url: str) -> Path:
    """A copy of a data file in the cache.

    Raises:
        DataError: there is no such file, or it cannot be read.
        UserError: see `opened`; or there is no room for it.
    """
    folder = cache_folder()
    if folder is None:
        raise UserError(f"{url} is copied into a folder, and none can be written: name one by {PLACE}.")
    file_system, path = opened(url)
    name = posixpath.basename(path.rstrip("/").partition("?")[0]) or "data"
    try:
        told = file_system.info(path)
        if told.get("type") == "directory":
            raise DataError(f"{url} is a folder: name the files in it, as {url.rstrip('/')}/*.parquet")
        state = _state(url, told)
        key = hashlib.sha256(f"{url}\0{state or file_system.cat_file(path)!r}".encode()).hexdigest()[:40]
        entry = kept(
            folder, f"{COPIES}/{key}", lambda new: file_system.get_file(path, str(new / name)), f"copying {url}"
        )
    except FileNotFoundError as error:
        raise DataError(f"{url}: no such data file") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{url} cannot be read, or copied to {folder}: {error or type(error).__name__}") from error
    return entry / name


def addresses(pattern: str) -> list[str]:
    """The addresses that fit a pattern (`*`, `**`), by name. Raises DataError where none does."""
    file_system, path = opened(pattern)
    try:
        found = sorted(file_system.glob(path))
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{pattern}: the folder cannot be listed: {error or type(error).__name__}") from error
    if not found:
        raise DataError(f"{pattern}: no data file fits this pattern")
    return [file_system.unstrip_protocol(one) for one in found]


def _state(url: str, told: dict[str, Any]) -> int:
    """Of what a file system says of a file."""
    if not told.keys() - SAYS_NOTHING:
        return 0
    return digest_of(json.dumps([url, told], sort_keys=True, default=str).encode())
