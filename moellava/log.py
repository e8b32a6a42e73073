"""One logger for the package; only rank 0 speaks."""

from __future__ import annotations

import logging
import os
import sys


def is_rank_zero() -> bool:
    """True in the one process that logs and writes shared files (`RANK` as launchers set it)."""
    return int(os.environ.get("RANK", "0")) == 0


def get_logger(name: str = "moellava") -> logging.Logger:
    """The package's logger, or a child of it. INFO and above on rank 0, errors alone elsewhere."""
    root = logging.getLogger("moellava")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        root.addHandler(handler)
        root.setLevel(logging.INFO if is_rank_zero() else logging.ERROR)
        root.propagate = False
    return logging.getLogger(name)
