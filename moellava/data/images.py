# SPDX-License-Identifier: Apache-2.0
"""Image files: opened in full or not at all, and shown as a viewer shows them."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from moellava.data.decoding import DECODER_ERRORS, decoding, require_file
from moellava.data.embedded import Embedded
from moellava.errors import BadFileError, DataError, UserError

ImageFile = str | Path | Embedded
"""Where an image lies, or its content."""

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `Limits` says more, and can be set

_ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND", "GIF": b"\x3b"}
"""What stands in the last bytes of a complete file of a format."""

_TAIL = 64
"""Bytes at a file's end that are searched for its ending; writers may pad a little."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation -> what makes an image upright. 1 is upright; any other number means nothing."""

_ON_THEIR_SIDE = frozenset({5, 6, 7, 8})
"""Orientations whose width is a height."""

_TURNED_BY_PILLOW = frozenset({"TIFF"})
"""Formats that Pillow decodes upright, and whose size it swaps, while their EXIF still says otherwise."""

_RANGES: dict[str, tuple[tuple[float, float], ...]] = {
    "I;16": ((0, 65535),),
    "I;16L": ((0, 65535),),
    "I;16B": ((0, 65535),),
    "I;16N": ((0, 65535),),
    "I": ((0, 255), (0, 65535)),
    "F": ((0, 1), (0, 255), (0, 65535)),
}
"""Modes of more than 8 bits a tone -> black and white in them, the narrowest range that holds an image first."""


@dataclass(frozen=True)
class Limits:
    """How large an image, or a frame of a video, may be. Looked at before anything is decoded.

    Attributes:
        pixels: width × height; the default is what Pillow itself takes for an attack.
        side: width or height in pixels.
        aspect_ratio: the longer side divided by the shorter one. Processors that scale the shorter side to a fixed
            length take memory in proportion to it.

    Raises:
        UserError: a limit below 1.
    """

    pixels: int = 178_956_970
    side: int = 30_000
    aspect_ratio: float = 200.0

    def __post_init__(self) -> None:
        flags = {"pixels": "max_image_pixels", "side": "max_image_side", "aspect_ratio": "max_aspect_ratio"}
        for name, flag in flags.items():
            if not getattr(self, name) >= 1:  # NaN is not, either
                raise UserError(f"--{flag} {getattr(self, name)}: a limit is at least 1.")

    def problem(self, size: tuple[int, int]) -> str | None:
        """What is wrong with a width and height in pixels, or None."""
        short, long = sorted(size)
        if short < 1:
            return f"{size[0]} × {size[1]} pixels are no picture"
        if long > self.side:
            return f"{size[0]} × {size[1]} pixels, but --max_image_side is {self.side}"
        if short * long > self.pixels:
            return f"{size[0]} × {size[1]} pixels, but --max_image_pixels is {self.pixels}"
        if long > self.aspect_ratio * short:
            return f"{size[0]} × {size[1]} pixels, but --max_aspect_ratio is {self.aspect_ratio:g}"
        return None

    def check(self, size: tuple[int, int], name: str | Path) -> None:
        """Raises BadFileError for a width and height in pixels beyond the limits."""
        problem = self.problem(size)
        if problem:
            raise BadFileError(f"{name}: {problem}")


USUAL_LIMITS = Limits()


def open_image(path: ImageFile, limits: Limits = USUAL_LIMITS) -> Image.Image:
    """The image of a file, decoded to its end: RGB, upright, on white, its tones in 8 bits. See `normalised`. Of an
    animation it is the first frame.

    Raises:
        BadFileError: the file is missing, damaged, not an image, or beyond the limits.
    """
    with _opened(path, limits) as image:
        orientation = _orientation(image)  # before pixels are decoded, as `image_size` sees it
        if image.format == "PNG":
            with Image.open(_source(path), formats=["PNG"]) as file:
                file.verify()  # for `load` looks at no checksum of pixels, and shows a hole in black
        image.load()
        shown = _shown(image, orientation)
        return shown.copy() if shown is image else shown  # the copy knows no file


def image_size(path: ImageFile, limits: Limits = USUAL_LIMITS) -> tuple[int, int]:
    """Width and height in pixels of the upright image, from the file's head. Raises BadFileError: see `open_image`."""
    with _opened(path, limits) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in _ON_THEIR_SIDE else (width, height)


def image_problem(path: ImageFile, in_full: bool = False, limits: Limits = USUAL_LIMITS) -> str | None:
    """What is wrong with an image file, or None.

    Args:
        path: the file, or its content.
        in_full: decode every pixel. Otherwise only head and ending are read, which finds files that are missing, of
            another format, cut short or beyond the limits; a file whose ending is unusual is decoded in full even so.
        limits: how large it may be.
    """
    try:
        if in_full or not _looks_complete(path, limits):
            open_image(path, limits)
    except DataError as error:
        return str(error)
    return None


def normalised(image: Image.Image, limits: Limits = USUAL_LIMITS) -> Image.Image:
    """An open image as a viewer shows it; itself, if it is so already.

    * It is upright, as its EXIF says that the camera was held.
    * What is transparent lies on white.
    * It is RGB of 8 bits a tone. More of them (modes I;16, I and F) are cut into 256 equal steps from black to white.
      These are 0 and 65535 where there are 16 bits. Wider modes hold whatever was put into them: 0 to 255 or 0 to
      65535, or 0 to 1 in floats, the narrowest range that holds every value; else their own least and greatest value.

    Raises:
        BadFileError: its pixels cannot be decoded or shown, or it is beyond the limits.
    """
    limits.check(image.size, "the image")
    with decoding("the image", "image", Image.DecompressionBombError):
        image.load()
        return _shown(image, _orientation(image))


@contextmanager
def _opened(path: ImageFile, limits: Limits) -> Iterator[Image.Image]:
    """An image file whose head is read. Raises BadFileError: see `open_image`; also for what fails inside."""
    if Image.MAX_IMAGE_PIXELS is not None and limits.pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = -(-limits.pixels // 2)  # Pillow refuses twice as many, before we are told the size
    with decoding(path, "image"):
        if not isinstance(path, Embedded):
            require_file(path, "image")
        try:
            with Image.open(_source(path)) as image:
                limits.check(image.size, str(path))
                yield image
        except UnidentifiedImageError as error:
            raise BadFileError(f"{path}: not an image that Pillow can read") from error
        except Image.DecompressionBombError as error:
            raise BadFileError(f"{path}: more pixels than --max_image_pixels {limits.pixels}: {error}") from error


def _source(path: ImageFile) -> str | Path | io.BytesIO:
    """What Pillow opens; it is at its beginning however often that was."""
    return io.BytesIO(path.getvalue()) if isinstance(path, Embedded) else path


def _looks_complete(path: ImageFile, limits: Limits) -> bool:
    """Whether head and ending are those of a complete image; False where that is not certain."""
    try:
        with _opened(path, limits) as image:
            ending = _ENDINGS.get(str(image.format))
            return ending is not None and ending in _tail(path)
    except BadFileError:
        return False


def _tail(path: ImageFile) -> bytes:
    """The last bytes of an image file."""
    if isinstance(path, Embedded):
        return path.getvalue()[-_TAIL:]
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
        return file.read()


def _orientation(image: Image.Image) -> int:
    """EXIF's, as far as it stands before the pixels; 1 where there is none, or none that can be read."""
    if image.format in _TURNED_BY_PILLOW:
        return 1
    try:
        # Not PngImageFile's, which decodes the pixels to see whether EXIF stands behind them.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except DECODER_ERRORS:
        return 1  # viewers show a picture whose EXIF is damaged
    return orientation if isinstance(orientation, int) else 1


def _shown(image: Image.Image, orientation: int) -> Image.Image:
    """See `normalised`. Raises what Pillow does."""
    if image.mode in _RANGES:
        flat = _in_8_bits(image)
    elif image.has_transparency_data:
        flat = _on_white(image)
    else:
        flat = image
    flat = flat if flat.mode == "RGB" else flat.convert("RGB")
    if orientation not in _TURNS:
        return flat
    upright = flat.transpose(_TURNS[orientation])
    upright.info = {}  # nobody turns it again
    return upright


def _in_8_bits(image: Image.Image) -> Image.Image:
    """An L image of one with more bits; what is not a number, or transparent by its value, is white."""
    values = np.asarray(image).astype(np.float64)
    known = np.isfinite(values)
    if image.info.get("transparency") is not None:
        known &= values != image.info["transparency"]
    if not known.any():
        return Image.new("L", image.size, "white")
    low, high = values.min(where=known, initial=np.inf), values.max(where=known, initial=-np.inf)
    low, high = next((pair for pair in _RANGES[image.mode] if pair[0] <= low and high <= pair[1]), (low, high))
    values[~known] = low  # a number, so that nothing is warned of
    values -= low
    values *= 256 / ((high - low) or 1)
    tones = values.clip(0, 255).astype(np.uint8)
    tones[~known] = 255
    return Image.fromarray(tones)


def _on_white(image: Image.Image) -> Image.Image:
    """An RGB image of one with transparency."""
    if image.mode == "La":  # premultiplied, which Pillow converts to its plain form alone
        image = image.convert("LA")
    layer = image.convert("RGBA")
    white = Image.new("RGB", layer.size, "white")
    white.paste(layer, mask=layer.getchannel("A"))
    return white
