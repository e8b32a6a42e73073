# SPDX-License-Identifier: Apache-2.0
"""Unpacking of archives, on every Python that is served: `filter=` came with 3.11.4, and Debian 12 has 3.11.2."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import BinaryIO


def unpack(archive: Path | BinaryIO, folder: Path) -> None:
    """Unpacks a tar file into a folder; nothing of it lands elsewhere, where Python can see to that."""
    with tarfile.open(archive) if isinstance(archive, Path) else tarfile.open(fileobj=archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(folder)
