# SPDX-License-Identifier: Apache-2.0
"""One logger for the package; only rank 0 speaks. And what a terminal is shown: text, never commands."""

from __future__ import annotations

import copy
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HARMFUL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, with which text moves the cursor, erases lines, sets titles or runs commands of a terminal; those
that turn the direction of writing; and half surrogates, which cannot be written. Line breaks and tabs are text."""


def printable(text: object) -> str:
    r"""What a terminal may be shown of a text that comes from records, file names, models or errors: control characters
    become escapes like \u001b, line breaks and tabs stay. JSON remains the same JSON."""
    return HARMFUL.sub(lambda match: f"\\u{ord(match[0]):04x}", str(text))


class PrintableFormatter(logging.Formatter):
    """Messages and tracebacks, as `printable` has them."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return printable(super().format(record))


WHOLE = "whole"
"""Attribute of a message whose short form is for the terminal: what a file is given in its place."""


class FileFormatter(PrintableFormatter):
    """For a log file: the time before each message, and messages in full where the terminal has a short form."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        whole = getattr(record, WHOLE, None)
        if whole is not None:
            record = copy.copy(record)
            record.msg, record.args = whole, None
        return super().format(record)


@contextmanager
def copied_to(path: Path) -> Iterator[None]:
    """All that the package logs goes to the end of a file as well, which a run that goes on continues."""
    handler, root = logging.FileHandler(path, encoding="utf-8", delay=True), get_logger()
    handler.setFormatter(FileFormatter())
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def is_rank_zero() -> bool:
    """True in the one process that logs and writes shared files (`RANK` as launchers set it)."""
    return int(os.environ.get("RANK", "0")) == 0


def get_logger(name: str = "moellava") -> logging.Logger:
    """The package's logger, or a child of it. INFO and above on rank 0, errors alone elsewhere."""
    root = logging.getLogger("moellava")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(PrintableFormatter("%(levelname)s %(message)s"))
        root.addHandler(handler)
        root.setLevel(logging.INFO if is_rank_zero() else logging.ERROR)
        root.propagate = False
    return logging.getLogger(name)
