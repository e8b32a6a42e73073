"""Image files: opened in full or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from moellava.errors import DataError

_ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND", "GIF": b"\x3b"}
"""What stands in the last bytes of a complete file of a format."""

_TAIL = 64
"""Bytes at a file's end that are searched for its ending; writers may pad a little."""


def open_image(path: str | Path | IO[bytes]) -> Image.Image:
    """The image of a file, decoded to its end, in RGB.

    Raises:
        DataError: the file is missing, truncated, not an image, or absurdly large.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image file") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: not an image that Pillow can read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: the image cannot be read: {error}") from error


def image_size(path: str | Path | IO[bytes]) -> tuple[int, int]:
    """Width and height in pixels, from the file's head. Raises DataError: see `open_image`."""
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: the image cannot be read: {error}") from error


def image_problem(path: str | Path | IO[bytes], in_full: bool = False) -> str | None:
    """What is wrong with an image file, or None.

    Args:
        path: the file; an open one is decoded in full.
        in_full: decode every pixel. Otherwise only head and ending are read, which finds files that are missing, of
            another format or cut short; a file whose ending is unusual is decoded in full even so.
    """
    try:
        if in_full or not isinstance(path, str | Path) or not _looks_complete(Path(path)):
            open_image(path)
    except DataError as error:
        return str(error)
    return None


def _looks_complete(path: Path) -> bool:
    """Whether head and ending are those of a complete image; False where that is not certain."""
    try:
        with Image.open(path) as image:
            ending = _ENDINGS.get(str(image.format))
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            return ending is not None and ending in file.read()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
