# SPDX-License-Identifier: Apache-2.0
"""How far a benchmark is: a bar on a terminal, else a line now and then; on the first process alone."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from moellava.log import get_logger, is_rank_zero

logger = get_logger(__name__)

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts what is done, with the time that the rest will take.

    Args:
        title: what is counted.
        total: of it.
        done: what an earlier run has done.
    """

    def __init__(self, title: str, total: int, done: int = 0):
        self.title, self.total, self.done, self.begun_at = title, total, done, done
        self.began = self.told = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if is_rank_zero() and self.done:
            logger.info("%s: %d of %d were answered before", self.title, self.done, self.total)
        if is_rank_zero() and sys.stderr.isatty():
            self.bar = tqdm(total=self.total, initial=self.done, desc=self.title, file=sys.stderr)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def add(self, count: int) -> None:
        """So many more are done."""
        self.at(self.done + count)

    def at(self, done: int) -> None:
        """So many are done in all."""
        count, self.done = done - self.done, done
        if self.bar is not None:
            self.bar.update(count)
        elif is_rank_zero() and time.monotonic() - self.told >= SECONDS_BETWEEN_LINES:
            self.told = time.monotonic()
            logger.info("%s", self.line(self.told - self.began))

    def line(self, seconds: float) -> str:
        """How far it is after so many seconds."""
        new = self.done - self.begun_at
        left = f"{seconds / new * (self.total - self.done):.0f} s to go" if new else "no answer yet"
        return f"{self.title}: {self.done} of {self.total}, {seconds:.0f} s, {left}"
