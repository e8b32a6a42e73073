# SPDX-License-Identifier: Apache-2.0
"""Data that lie elsewhere: `s3://…`, `gs://…`, `hf://…`, `http://…`, whatever `fsspec` opens.

A data file is copied into the cache once, by what the other side says of its content, and its index is made of the
copy; for shards see `shard_parts.py`. Pictures are fetched when they are shown, and kept up to a limit. Of these no
more is looked at before a run than that they are there, by the list of their folder where the other side has one.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moellava.data.cache import PLACE, cache_folder, kept
from moellava.data.digests import digest_of
from moellava.data.embedded import Embedded
from moellava.data.fetched import is_kept, keep_content, kept_content, limit
from moellava.data.file_systems import BROKEN, TOGETHER, Held, UnreachableError, held, opened, reaching
from moellava.data.remembered import Remembered
from moellava.data.saved_sets import files_of_set
from moellava.errors import BadFileError, DataError, UserError
from moellava.files import PROTOCOLS

_URL = re.compile(f"{PROTOCOLS}://", re.IGNORECASE)

FOLDERS_KEPT = 1024
"""Folders whose lists are remembered."""

AT_ONCE = 8
"""Files that are fetched side by side from a file system that does not do so itself."""

BLOCK = 8 * 2**20
"""Bytes that are fetched at a time of a file that is read from its beginning to its end."""

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


class Span(NamedTuple):
    """What is asked for of a file system: a file, or some bytes of it.

    Attributes:
        file_system: of `fsspec`; None: of this machine, where bytes of a file are asked for.
        path: of the file, as the file system calls it.
        begin, end: of the bytes; None: the whole file.
        alone: see `Held`.
    """

    file_system: Any
    path: str
    begin: int | None = None
    end: int | None = None
    alone: AbstractContextManager[Any] = TOGETHER

    def read(self) -> bytes:
        """The bytes. Raises OSError."""
        try:
            with self.alone, reaching():
                return self._read()
        except (*BROKEN, RuntimeError) as error:  # zipfile's where it cannot unpack a file, or a password is needed
            raise error if isinstance(error, OSError) else OSError(str(error)) from error

    def _read(self) -> bytes:
        if self.file_system is None:
            with open(self.path, "rb", buffering=0) as file:
                return os.pread(file.fileno(), (self.end or 0) - (self.begin or 0), self.begin or 0)
        from fsspec.spec import AbstractFileSystem

        if self.begin is None or type(self.file_system).cat_file is not AbstractFileSystem.cat_file:
            return self.file_system.cat_file(self.path, start=self.begin, end=self.end)
        with self.file_system.open(self.path, "rb", cache_type="none") as file:  # the usual way reads megabytes ahead
            file.seek(self.begin)
            return file.read((self.end or 0) - self.begin)


class Distant:
    """A content that lies elsewhere, or in a shard. As text it says where."""

    state: int | None
    """64 bits of what the other side says of it, under which it is kept; 0: it is not, None: there is no such
    content."""

    is_near = False
    """Whether it lies on this machine, to be read each time as other files are."""

    def span(self) -> Span | None:
        """Where it lies; None where it is not one piece of a file."""
        raise NotImplementedError

    def accepted(self, content: bytes) -> bytes:
        """What was fetched. Raises OSError where it is another content."""
        return content

    def fetch(self) -> bytes:
        """The content, from the other side. Raises OSError."""
        span = self.span()
        assert span is not None, "what is no piece has a way of its own"
        return span.read()

    def read_bytes(self) -> bytes:
        """The content. Raises OSError."""
        key = self.state or 0
        content = kept_content(key)
        if content is None:
            content = self.accepted(self.fetch())
            keep_content(key, content)
        return content

    def fetched(self) -> Fetched:
        """The content, to be decoded. Raises BadFileError where it cannot be read."""
        try:
            return Fetched(self.read_bytes(), str(self))
        except (OSError, ValueError) as error:
            raise BadFileError(f"{self}: the file cannot be read: {error or type(error).__name__}") from error


class RemoteFile(Distant):
    """A file that lies elsewhere.

    Args:
        folder: that its path is relative to.
        path: as its record has it.
    """

    def __init__(self, folder: RemoteFolder, path: str):
        self.folder, self.path = folder, path

    def __str__(self) -> str:
        return f"{self.folder}/{self.path}"

    def span(self) -> Span:
        """All of the file."""
        held = self.folder.held
        return Span(held.file_system, self.folder.path_of(self.path), alone=held.alone)

    @property
    def state(self) -> int | None:  # type: ignore[override]  # it is asked for
        """See `Distant.state`."""
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
        self._root = held(self.url).root
        self._lists = Remembered(self._list, FOLDERS_KEPT)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, path: str) -> RemoteFile | Path:
        return Path(path) if os.path.isabs(path) else RemoteFile(self, path)

    @property
    def held(self) -> Held:
        """Asked for anew each time: a connection does not survive a fork, and each process has its own."""
        return held(self.url)

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
            file_system, _, alone = self.held
            with alone, reaching():
                told = file_system.info(whole)
        except UnreachableError as error:
            raise UserError(f"{self.url}: {error}") from error
        except (OSError, ValueError):
            return None
        return state_told(self.url, told) if is_file(told) else None

    def _list(self, folder: str) -> tuple[np.ndarray, np.ndarray]:
        """Digests of the names of a folder's files, sorted, and their states. What the list does not call a file, as a
        link on this machine, is asked for by itself, which follows it."""
        try:
            file_system, _, alone = self.held
            with alone, reaching():
                entries = [one for one in file_system.ls(folder, detail=True) if is_file(one)]
        except (OSError, ValueError, NotImplementedError):  # a server that lists nothing: each file is asked for
            entries = []
        names = [posixpath.basename(one["name"]).encode("utf-8", "surrogateescape") for one in entries]
        digests = np.array([digest_of(name) for name in names], np.uint64)
        states = np.array([state_told(self.url, one) for one in entries], np.uint64)
        order = np.argsort(digests)
        return digests[order], states[order]


def is_remote(name: object) -> bool:
    """Whether a name is an address: `protocol://…`."""
    return bool(_URL.match(str(name)))


def open_file(name: str | Path) -> Any:
    """A file here or elsewhere, opened to be read from its beginning to its end. Raises OSError, and see `opened`."""
    if not is_remote(name):
        return open(name, "rb")
    file_system, path = opened(str(name))
    with reaching():
        file = file_system.open(path, "rb", block_size=BLOCK, cache_type="readahead")
    file.held_open_by = file_system  # one of an archive is nobody else's, and closes its files when it goes
    return file


def fetch_together(wanted: Iterable[Distant]) -> None:
    """Fetches contents side by side where they are kept, so that whoever reads them need not wait for each.

    What cannot be fetched is left to its reader, who says why.
    """
    if not limit() or cache_folder() is None:
        return
    new: dict[int, Distant] = {}
    for one in wanted:
        with suppress(UserError):  # nobody answers
            if (state := one.state) and not is_kept(state):  # which a server without lists is asked for
                new[state] = one
    of_each: dict[int, list[tuple[int, Distant, Span]]] = {}
    for state, one in new.items():
        if (span := one.span()) is not None:
            of_each.setdefault(id(span.file_system), []).append((state, one, span))
    for asked in of_each.values():
        for (state, one, _), content in zip(asked, _side_by_side([span for *_, span in asked]), strict=True):
            with suppress(OSError):
                if isinstance(content, bytes):
                    keep_content(state, one.accepted(content))


def _side_by_side(spans: Sequence[Span]) -> list[bytes | Exception | None]:
    """The bytes of spans of one file system; something else where they cannot be read."""
    file_system = spans[0].file_system
    if file_system.async_impl:
        paths, begins, ends = (list(column) for column in zip(*(span[1:4] for span in spans), strict=True))
        return file_system.cat_ranges(paths, begins, ends, on_error="return")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        reading = [pool.submit(span.read) for span in spans]
    return [None if one.exception() else one.result() for one in reading]


def copied(url: str) -> Path:
    """A copy of a data file in the cache, or of a folder that `datasets.save_to_disk` wrote.

    Raises:
        DataError: there is no such file, or it cannot be read; or another folder.
        UserError: see `opened`; or there is no room for it.
    """
    folder = cache_folder()
    if folder is None:
        raise UserError(f"{url} is copied into a folder, and none can be written: name one by {PLACE}.")
    file_system, path = opened(url)
    try:
        with reaching():
            return _copied(url, file_system, path, folder)
    except FileNotFoundError as error:
        raise DataError(f"{url}: no such data file") from error
    except DataError:  # a ValueError, too
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{url} cannot be read, or copied to {folder}: {error or type(error).__name__}") from error


def _copied(url: str, file_system: Any, path: str, folder: Path) -> Path:
    name = posixpath.basename(path.rstrip("/").partition("?")[0]) or "data"
    files = _files_at(url, file_system, path, name)
    states = [state_told(url, told) or file_system.cat_file(whole) for _, whole, told in files]

    def copy(new: Path) -> None:
        for inside, whole, _ in files:
            (new / inside).parent.mkdir(parents=True, exist_ok=True)
            file_system.get_file(whole, str(new / inside))

    entry = copy_named(url, states[0] if len(states) == 1 else repr(states).encode())
    return kept(folder, entry, copy, f"copying {url}") / name


def _files_at(url: str, file_system: Any, path: str, name: str) -> list[tuple[str, str, dict[str, Any]]]:
    """What is copied of an address: as it shall be called, where it lies, and what is said of it.

    Raises:
        DataError: it is no file, and no data set.
        FileNotFoundError: there is nothing.
    """
    told = file_system.info(path)
    if told.get("type") != "directory":
        if not is_file(told):
            raise DataError(f"{url} is a pipe or a device, not a file")
        return [(name, path, told)]
    described, files = files_of_set(url, lambda one: file_system.cat_file(f"{path}/{one}"))
    found = []
    for one in described + files:
        try:
            found.append((f"{name}/{one}", f"{path}/{one}", file_system.info(f"{path}/{one}")))
        except FileNotFoundError as error:
            raise DataError(f"{url} is not whole: {one} is missing, which it names") from error
    return found


def copy_named(url: str, said: int | bytes) -> str:
    """The entry of the cache for the copy of a data file; `said`: its state, or, where it has none, its content."""
    return f"{COPIES}/{hashlib.sha256(f'{url}{chr(0)}{said!r}'.encode()).hexdigest()[:40]}"


def addresses(pattern: str) -> list[str]:
    """The addresses that fit a pattern (`*`, `**`), by name. Raises DataError where none does."""
    file_system, path = opened(pattern)
    try:
        with reaching():
            found = sorted(file_system.glob(path))
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{pattern}: the folder cannot be listed: {error or type(error).__name__}") from error
    if not found:
        raise DataError(f"{pattern}: no data file fits this pattern")
    return [file_system.unstrip_protocol(one) for one in found]


def is_file(told: dict[str, Any]) -> bool:
    """Whether what a file system says of a name is about a file: who opens a pipe may wait for ever."""
    return told.get("type") not in ("directory", "other")


def state_told(url: str, told: dict[str, Any]) -> int:
    """64 bits of what a file system says of a file; 0 where that is nothing about its content."""
    if not told.keys() - SAYS_NOTHING:
        return 0
    return digest_of(json.dumps([url, told], sort_keys=True, default=str).encode())
