# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a folder: a lock that dies with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moellava.errors import UserError

LOCK = ".lock"


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Holds a run's folder, which is made if need be; a folder that is empty at the end goes again.

    A POSIX lock (`fcntl.lockf`): a forked worker of a `DataLoader` does not inherit it, so it ends with this process
    even where a worker lives a little longer.

    Raises:
        UserError: another process holds it, and the message names it; or the folder cannot be written, or locked.
    """
    is_new, path = not output_dir.exists(), output_dir / LOCK
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        if is_new and output_dir.is_dir() and not any(output_dir.iterdir()):
            output_dir.rmdir()


def _acquire(path: Path) -> int:
    """An open, locked file, whose content says who holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise UserError(
                f"--output_dir {path.parent} is in use by {holder}: two runs in one folder would overwrite each other. "
                "Wait for it, end it, or choose another folder."
            ) from error
        if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return descriptor
        os.close(descriptor)  # its holder has ended, and removed it, between our two steps
