# SPDX-License-Identifier: Apache-2.0
"""What is found out about data once, kept in a folder of this machine, whatever run asks for it again.

    MOELLAVA_CACHE, or else HF_HOME/moellava, XDG_CACHE_HOME/moellava, ~/.cache/moellava

Everything in it is named by content, and can be made again: it may be deleted whenever no run begins, but for copies of
shards, which a run reads to its end. Nothing is ever written beside the data.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moellava.files import flush_tree, is_address, problem_of_writing, read_json, write_json
from moellava.log import get_logger

PLACE = "MOELLAVA_CACHE"
"""The environment variable that names the folder."""

LOCK = ".lock"


def cache_folder() -> Path | None:
    """The folder, made if need be; None, which is said once, where it cannot be written: then nothing is kept."""
    folder = _named()
    problem = _problem(folder)
    return None if problem else folder


def _named() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if os.environ.get(PLACE):
        return Path(os.environ[PLACE])
    return Path(os.environ.get("HF_HOME") or home) / "moellava"


@functools.lru_cache(maxsize=8)
def _problem(folder: Path) -> str | None:
    problem: str | None = "a place on this machine is needed"
    try:
        if not is_address(folder):
            folder.mkdir(parents=True, exist_ok=True)
            problem = problem_of_writing(folder)
    except OSError as error:
        problem = str(error.strerror)
    if problem:
        get_logger(__name__).warning(
            "%s cannot be written (%s): every process reads the data anew. %s names another folder.",
            folder, problem, PLACE,
        )  # fmt: skip
    return problem


def remembered(folder: Path, name: str, find: Callable[[], str]) -> str:
    """A text of the cache that `find` gives, once. Where it cannot be written, it is found anew each time."""
    path = folder / f"{name}.json"
    if path.is_file():
        return str(read_json(path))
    found = find()
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        write_json(path, found)
    return found


def kept(folder: Path, name: str, build: Callable[[Path], None], what: str) -> Path:
    """An entry of the cache, which one process makes while others wait.

    Args:
        folder: of `cache_folder`.
        name: of the entry, a folder below it.
        build: writes the entry's files to an empty folder.
        what: that is done, for whoever waits for it.

    Raises:
        OSError: it cannot be written; and whatever `build` raises. Nothing of it is left then.
    """
    entry = folder / name
    if entry.is_dir():
        return entry
    with locked(folder, name, what) as is_held:
        if not entry.is_dir():
            entry.parent.mkdir(parents=True, exist_ok=True)
            for left in entry.parent.glob(f"{entry.name}.new-*") if is_held else ():
                shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
            temporary = Path(tempfile.mkdtemp(prefix=f"{entry.name}.new-", dir=entry.parent))
            temporary.chmod(0o755)  # other users of the cache read it
            try:
                build(temporary)
                flush_tree(temporary)
                with suppress(OSError):  # where locks do nothing, another process may have been faster
                    os.rename(temporary, entry)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return entry


@contextmanager
def locked(folder: Path, name: str, what: str) -> Iterator[bool]:
    """Holds the lock of an entry; False where the file system has none. It dies with its process. One process holds one
    at a time: no two inside each other.

    All entries share one file, of which each locks a byte of its own, so that no lock files are left about.
    """
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield _lock(descriptor, place, what)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, place: int, what: str) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except (BlockingIOError, PermissionError):
        get_logger(__name__).info("Waiting for another process that is %s", what)
        fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, place)
    except OSError as error:  # a file system without locks: each process works for itself, and the first entry stays
        get_logger(__name__).info("The cache's disk has no locks: %s", error.strerror)
        return False
    return True
