# SPDX-License-Identifier: Apache-2.0
"""Which model a score is of: a hash of its files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from moellava.files import MODEL_FILES, file_digest, read_digests, resolve_folder


def checkpoint_digest(path: str | Path, flag: str) -> str:
    """SHA-256 over names and SHA-256 of a folder's weights, configs and tokenizer.

    What a folder of ours has recorded is taken from there, and what it has not recorded (a run's log) is no part of it.

    Raises:
        UserError: there is no such folder.
    """
    folder = resolve_folder(path, flag)
    recorded = read_digests(folder) or {}
    names = recorded.keys() or {file.name for pattern in MODEL_FILES for file in folder.glob(pattern)}
    total = hashlib.sha256()
    for name in sorted(names):
        total.update(f"{name} {recorded.get(name) or file_digest(folder / name)}\n".encode("utf-8", "backslashreplace"))
    return total.hexdigest()
