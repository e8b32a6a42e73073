"""What makes a command start sooner."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Around the first import of torch and transformers, which takes seconds.

    They make a million objects that stay. Python's garbage collector would look at all of them several times meanwhile,
    a tenth of the start, and again whenever a run asks it to collect: here it rests, and forgets them for good.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
