# SPDX-License-Identifier: Apache-2.0
"""What glibc does with memory that is freed: gives it to the system, or keeps it for what comes next.

A step frees what the step before it freed. Where that is given back each time, the kernel has to find and clear every
page again: some 20,000 a step of a small model, a sixth of its CPU time. With another C library, or another allocator
in glibc's place (jemalloc, tcmalloc), nothing here does anything.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Options of mallopt(3): free bytes at the heap's end that are given back; bytes from which a block is mapped alone,
and given back as soon as it is freed; how many blocks may be."""

USUAL = ((MMAP_MAX, 2**16), (MMAP_THRESHOLD, 2**25), (TRIM_THRESHOLD, 2**26))
"""What glibc comes to by itself where blocks are large: mapped from 32 MB on, given back from 64 MB on."""

KEPT = ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1))

IN_FORKS = ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**29))
"""Of data workers: no block is mapped alone, and what is free is given back where it is more than 512 MB. A batch of
pixels, one block of 60 MB of Qwen2-VL's and 300 of SmolVLM's, takes the pages of the batch before."""


@contextmanager
def kept() -> Iterator[None]:
    """Inside, freed memory stays with the process; behind it, all that is free is given back. For processes that are
    forked inside (data workers) see `keep_some_in_forks`."""
    _choose(KEPT)
    keep_some_in_forks()
    try:
        yield
    finally:
        _choose(USUAL)
        give_back()


def give_back() -> None:
    """Gives all that is free to the system now, as after what is done once and takes much: loading, saving."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def give_back_above(size: int) -> None:
    """From now on blocks of more bytes are given back as soon as they are freed.

    glibc otherwise raises that limit to the largest block freed so far, and keeps what lies between smaller ones.
    """
    _choose([(MMAP_THRESHOLD, size)])


@cache
def keep_some_in_forks() -> None:
    """From now on processes that are forked keep up to 512 MB of what they free, in blocks of any size."""
    os.register_at_fork(after_in_child=lambda: _choose(IN_FORKS))


def _choose(options: Any) -> None:
    mallopt = _of_glibc("mallopt")
    for option, value in options if mallopt is not None else ():
        mallopt(option, value)


@cache
def _of_glibc(name: str) -> Any:
    """A function of the C library; None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
