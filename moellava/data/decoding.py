# SPDX-License-Identifier: Apache-2.0
"""What decoders raise on damaged files, and how that becomes a problem of the file.

Pillow and PyAV promise no exceptions of their own: what a file makes them raise depends on where its damage is. The
list was found by damaging files, and is proved complete by it: `python -m tests.attacks --all --only media`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moellava.data.record_keys import brief_text
from moellava.errors import BadFileError, UserError
from moellava.files import NO_FILE, file_problem

DECODER_ERRORS: tuple[type[Exception], ...] = (
    ArithmeticError,  # rates of 0, numbers beyond what fits
    AssertionError,
    AttributeError,  # of a part that the file lacks
    BufferError,
    EOFError,
    LookupError,
    MemoryError,
    NameError,  # a local variable that only a sound file sets
    OSError,
    RuntimeError,  # NotImplementedError and RecursionError, too
    StopIteration,
    SyntaxError,
    SystemError,
    TypeError,
    ValueError,  # UnicodeError, too
    struct.error,
    zlib.error,
)
"""What the code of a decoder may raise on a damaged file, beside exceptions of its own library."""

FOR_PEOPLE = (OSError, SyntaxError, ValueError)
"""Exceptions whose texts are messages; of others the name says more."""

SHOWN = 200
"""Characters of a decoder's message that are passed on."""


def require_file(path: str | Path, modality: str) -> None:
    """Raises BadFileError where there is no file to read; a pipe or a device would be waited for forever."""
    wrong = file_problem(path)
    if wrong:
        what = f"no such {modality} file" if wrong == NO_FILE else wrong
        raise BadFileError(f"{brief_text(str(path))}: {what}")


@contextmanager
def decoding(name: object, modality: str, *own: type[Exception]) -> Iterator[None]:
    """Inside, whatever a decoder raises is a problem of its file.

    Args:
        name: the file, or what messages call an image that is open already; as text it names itself.
        modality: 'image' or 'video'.
        own: exceptions of the decoder's library.

    Raises:
        BadFileError: the decoder gave up.
    """
    try:
        yield
    except UserError:
        raise
    except (*DECODER_ERRORS, *own) as error:
        raise BadFileError(f"{name}: the {modality} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What an exception says, in one line."""
    said = getattr(error, "strerror", None) or (error if error.args else "")
    text = " ".join(str(said).split())[:SHOWN]
    if text and isinstance(error, FOR_PEOPLE):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
