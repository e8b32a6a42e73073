# SPDX-License-Identifier: Apache-2.0
"""By what number contents are known."""

from __future__ import annotations

import hashlib


def digest_of(content: bytes) -> int:
    """64 bits of a content."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
