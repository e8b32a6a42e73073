# SPDX-License-Identifier: Apache-2.0
"""What tests ask of keys of records."""

from __future__ import annotations

from pathlib import Path


def place_of(key: str) -> tuple[str, int]:
    """The name of a record's file and its number there, from its key `FILE:NUMBER:DIGEST`."""
    file, number, _ = key.rsplit(":", 2)
    return Path(file).name, int(number)
