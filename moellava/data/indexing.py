# SPDX-License-Identifier: Apache-2.0
"""Which index a data file has: one that is kept under its content, or, of a small file, one that is made anew."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from moellava.constants import ROLES
from moellava.data.cache import PLACE, cache_folder, kept, remembered
from moellava.data.file_systems import reaching
from moellava.data.formats import rows_of
from moellava.data.index import FileIndex, index_in_memory, open_index, save_index
from moellava.data.record_reader import RecordReader
from moellava.data.record_rows import rows_for
from moellava.data.remote import copied, is_remote
from moellava.data.saved_sets import SPLITS
from moellava.data.shard_parts import Shard, shard_at
from moellava.errors import DataError, UserError
from moellava.files import file_digest
from moellava.log import get_logger

KEPT_FROM = 2**20
"""Bytes of a data file from which its index is kept; to read a smaller one costs no more than to look for its index."""

SETTLED = 2.0
"""Seconds after which a file that changes would have another time of change, on any file system."""

INDEXES, DIGESTS = "indexes", "digests"
"""Folders of the cache: indexes by content, and the contents of files by their size and time of change."""

Reading = Callable[[], tuple[Iterator[Any], dict[str, Any]]]
"""() -> the rows of a file, and its facts. See `_read`."""

logger = get_logger(__name__)


def index_of(path: str | Path, roles: tuple[str, str] = ROLES) -> FileIndex:
    """The index of a data file or folder; `facts` hold what is wrong with the whole of it.

    Args:
        path: of any format (see `formats.py`), or an address (see `remote.py`).
        roles: what it calls the human and the model, beside the usual names.

    Raises:
        UserError: a package that its format needs is not installed; the index cannot be written.
    """
    if is_remote(path):
        try:
            if shard := shard_at(str(path)):
                return _index_of_shard(shard, roles)
            path = copied(str(path))
        except DataError as error:
            return index_in_memory(iter(()), {"problems": error.problems, "ignored": {}, "seen": []})
    files = files_of(Path(path))
    read = partial(_read, str(path), lambda: rows_of(path), roles)
    if sum(size for _, size, _ in files) >= KEPT_FROM and (folder := cache_folder()) is not None:
        return _kept_index(folder, _name_of(Path(path), files, roles, folder), path, read)
    return index_in_memory(*read(), lies=str(path))


def _index_of_shard(shard: Shard, roles: tuple[str, str]) -> FileIndex:
    """The index of a shard that lies elsewhere, known by what the other side says of it."""
    folder = cache_folder()
    assert folder is not None, "what lies elsewhere is copied where nothing can be kept, and that is refused"
    name = sha256_of([code_digest(), roles, shard.url, shard.state])
    read = partial(_read, shard.url, lambda: shard.read(shard.url), roles)
    return _kept_index(folder, name, shard.url, read)


def _kept_index(folder: Path, name: str, path: str | Path, read: Reading) -> FileIndex:
    """The index of that name in the cache, made if need be; of a broken file, one that is not kept."""
    try:
        entry = kept(folder, f"{INDEXES}/{name}", lambda entry: _save(entry, path, read), f"reading {path}")
        return open_index(entry, str(path))
    except _BrokenFileError:  # what is wrong with it may be mended
        return index_in_memory(*read(), lies=str(path))
    except OSError as error:
        raise UserError(
            f"The index of {path} cannot be kept in {folder}: {error.strerror or error}. Make room there, or name "
            f"another folder by {PLACE}."
        ) from error


class _BrokenFileError(Exception):
    """A data file that cannot be read to its end."""


def _save(entry: Path, path: str | Path, read: Reading) -> None:
    logger.info("Reading %s: its index is kept in %s", path, entry.parent)
    began = time.monotonic()
    rows, facts = read()
    save_index(entry, rows, facts)
    if facts["problems"]:
        raise _BrokenFileError
    logger.info("Read %s in %.0f s", path, time.monotonic() - began)


def _read(
    name: str, values: Callable[[], Iterator[Any]], roles: tuple[str, str]
) -> tuple[Iterator[Any], dict[str, Any]]:
    """The rows of a file, and its facts, which are complete when the last row has been asked for.

    Args:
        name: of the file.
        values: opens the file.
        roles: see `index_of`.
    """
    facts: dict[str, Any] = {"problems": [], "ignored": {}, "seen": []}

    def rows() -> Iterator[Any]:
        reader = RecordReader(roles)
        try:
            with reaching():
                yield from rows_for(values(), reader)
        except DataError as error:
            facts["problems"] = error.problems
        except OSError as error:  # a connection, or a disk, that breaks in the middle
            facts["problems"] = [f"{name} cannot be read to its end: {error or type(error).__name__}"]
        facts["ignored"] = reader.ignored
        facts["seen"] = sorted(reader.speakers.seen)

    return rows(), facts


def files_of(path: Path) -> list[tuple[str, int, int]]:
    """(name, size in bytes, time of change in ns) of a data file, or of the files in a folder; none where there are
    none that can be read."""
    try:
        inside = path.rglob if (path / SPLITS).is_file() else path.glob
        found = sorted(inside("*")) if path.is_dir() else [path]
        states = [(file, os.stat(file)) for file in found]
    except (OSError, ValueError):  # whoever reads it says why
        return []
    return [(str(file), state.st_size, state.st_mtime_ns) for file, state in states if file.is_file()]


def _name_of(path: Path, files: list[tuple[str, int, int]], roles: tuple[str, str], folder: Path) -> str:
    """What decides over an index: what the files hold, how they are called, and the code that reads them."""
    digests = [_digest(folder, *file) for file in files]
    # A file's endings may decide over its format.
    parts = [roles, path.suffixes, [Path(name).name for name, _, _ in files] if path.is_dir() else "", digests]
    return sha256_of([code_digest(), *parts])


def _digest(folder: Path, name: str, size: int, changed: int) -> str:
    """SHA-256 of a file, which is read again only when its size or its time of change is another."""
    if time.time() - changed / 1e9 < SETTLED:
        return file_digest(name)
    state = [os.path.realpath(name), size, changed]
    return remembered(folder, f"{DIGESTS}/{sha256_of(state)}", lambda: file_digest(name))


@functools.cache
def code_digest() -> str:
    """Of the code that looks at data: another version of it looks anew."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return sha256_of([[source.name, source.read_text(encoding="utf-8")] for source in sources])


def sha256_of(content: Any) -> str:
    """A digest of JSON."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:40]
