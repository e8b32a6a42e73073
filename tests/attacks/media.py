# SPDX-License-Identifier: Apache-2.0
"""Damaged images and videos: each is read, or is a named problem of its file.

Sound files of every format that Pillow writes, and of many that FFmpeg does, are damaged in ways that disks, networks
and attackers know: bits turned, bytes overwritten, lost, doubled or put from elsewhere, numbers of extreme size, files
cut short. A seed gives the same files each time.
"""

from __future__ import annotations

import io
import random
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import ExifTags, Image

from moellava.data.images import image_problem, image_size, open_image
from moellava.data.video import read_video, video_problem
from moellava.errors import DataError
from tests.attacks.outcome import Outcome

QUICK, ALL = (200, 20), (3000, 300)
"""Images and videos."""

SECONDS = 20
"""Time for a file; one that takes longer hangs."""

FRAMES = 2

EXTREMES = [bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\xff\xff", b"\x80\x00\x00\x00"]
"""Numbers that decoders multiply, allocate and seek by."""


class Hang(BaseException):
    """A file that takes too long; no decoder's exception."""


def picture(mode: str = "RGB", size: tuple[int, int] = (48, 32)) -> Image.Image:
    """A picture with some structure, in a mode."""
    return Image.effect_mandelbrot(size, (-3, -2.5, 2, 2.5), 20).convert("RGB").convert(mode)


def sideways() -> bytes:
    """EXIF of an image that lies on its side, with a little more."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "moellava"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"ASCII\0\0\0hello"
    return exif.tobytes()


def image_seeds() -> dict[str, bytes]:
    """name -> a sound image file: formats, modes and what stands beside the pixels."""
    colours, exif = picture(), sideways()
    frames = {"save_all": True, "append_images": [picture().rotate(90 * turn) for turn in (1, 2)], "duration": 40}
    palette = colours.quantize(16)
    wide = picture("L").convert("I")
    written: dict[str, tuple[Image.Image, str, dict]] = {
        "jpg": (colours, "JPEG", {"exif": exif}),
        "progressive.jpg": (colours, "JPEG", {"progressive": True, "comment": b"hello"}),
        "cmyk.jpg": (picture("CMYK"), "JPEG", {}),
        "grey.jpg": (picture("L"), "JPEG", {"icc_profile": bytes(200)}),
        "mpo": (colours, "MPO", {"save_all": True, "append_images": [colours], "exif": exif}),
        "png": (colours, "PNG", {"exif": exif, "dpi": (72, 72)}),
        "rgba.png": (picture("RGBA"), "PNG", {}),
        "grey.png": (picture("LA"), "PNG", {}),
        "palette.png": (palette, "PNG", {"transparency": bytes(range(16))}),
        "bits.png": (picture("1"), "PNG", {"transparency": 0}),
        "wide.png": (wide.convert("I;16"), "PNG", {}),
        "animated.png": (colours, "PNG", frames),
        "gif": (palette, "GIF", {"transparency": 3, "comment": b"hello"}),
        "animated.gif": (palette, "GIF", frames | {"disposal": 2}),
        "webp": (picture("RGBA"), "WEBP", {"exif": exif}),
        "lossless.webp": (colours, "WEBP", {"lossless": True}),
        "animated.webp": (colours, "WEBP", frames),
        "avif": (colours, "AVIF", {"exif": exif}),
        "jp2": (picture("RGBA"), "JPEG2000", {}),
        "tif": (colours, "TIFF", {"exif": exif}),
        "lzw.tif": (picture("RGBA"), "TIFF", {"compression": "tiff_lzw"}),
        "deflate.tif": (palette, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "jpeg.tif": (colours, "TIFF", {"compression": "jpeg"}),
        "packbits.tif": (picture("L"), "TIFF", {"compression": "packbits"}),
        "fax.tif": (picture("1"), "TIFF", {"compression": "group4"}),
        "wide.tif": (wide.convert("I;16"), "TIFF", {}),
        "float.tif": (picture("F"), "TIFF", {}),
        "pages.tif": (colours, "TIFF", {"save_all": True, "append_images": [colours]}),
        "bmp": (colours, "BMP", {}),
        "palette.bmp": (palette, "BMP", {}),
        "dib": (colours, "DIB", {}),
        "ppm": (colours, "PPM", {}),
        "pgm": (wide, "PPM", {}),
        "pfm": (picture("F"), "PPM", {}),
        "pbm": (picture("1"), "PPM", {}),
        "tga": (picture("RGBA"), "TGA", {"compression": "tga_rle"}),
        "ico": (picture("RGBA"), "ICO", {"sizes": [(16, 16), (32, 32)]}),
        "bmp.ico": (picture("RGBA"), "ICO", {"sizes": [(32, 32)], "bitmap_format": "bmp"}),
        "icns": (picture("RGBA", (64, 64)), "ICNS", {}),
        "pcx": (colours, "PCX", {}),
        "dds": (picture("RGBA"), "DDS", {}),
        "dxt.dds": (picture("RGBA"), "DDS", {"pixel_format": "DXT5"}),
        "sgi": (colours, "SGI", {}),
        "qoi": (colours, "QOI", {}),
        "blp": (palette, "BLP", {}),
        "im": (colours, "IM", {}),
        "msp": (picture("1"), "MSP", {}),
        "spider": (picture("F"), "SPIDER", {}),
        "xbm": (picture("1"), "XBM", {}),
    }  # fmt: skip
    return {name: saved(*how) for name, how in written.items()}


def saved(image: Image.Image, layout: str, options: dict) -> bytes:
    """An image file's content."""
    file = io.BytesIO()
    image.save(file, layout, **options)
    return file.getvalue()


CODECS = {
    "mp4": ("mpeg4", "yuv420p", {}),
    "h264.mp4": ("libx264", "yuv420p", {"movflags": "faststart"}),
    "mov": ("mjpeg", "yuvj420p", {}),
    "mkv": ("libx264", "yuv420p", {}),
    "webm": ("libvpx-vp9", "yuv420p", {}),
    "vp8.webm": ("libvpx", "yuv420p", {}),
    "avi": ("mpeg4", "yuv420p", {}),
    "ffv1.avi": ("ffv1", "yuv420p", {}),
    "ts": ("mpeg2video", "yuv420p", {}),
    "flv": ("flv", "yuv420p", {}),
    "wmv": ("wmv2", "yuv420p", {}),
    "animated.gif": ("gif", "rgb8", {}),
}
"""Name of a video file -> codec, pixel format, options of its container."""


def video_seeds() -> dict[str, bytes]:
    """name -> a sound video file of a few frames, with a title."""
    return {name: filmed(name, *how) for name, how in CODECS.items()}


def filmed(name: str, codec: str, pixels: str, options: dict[str, str]) -> bytes:
    """A video file's content."""
    import av

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip.{name}"
        with av.open(str(path), "w", options=options) as container:
            container.metadata["title"] = "Grüße vom Bodensee"
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 48, 32, pixels
            stream.codec_context.gop_size = 4
            for number in range(8):
                container.mux(stream.encode(av.VideoFrame.from_image(picture().rotate(10 * number))))
            container.mux(stream.encode())
        return path.read_bytes()


def damaged(content: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """A file with one to four damages, half of them in its head, where sizes and offsets are."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(min(len(data), 200) if chance.random() < 0.5 else len(data))
        chance.choice(DAMAGES)(data, place, others, chance)
        if not data:
            break
    return bytes(data)


def turn_bits(data: bytearray, place: int, others: list[bytes], chance: random.Random) -> None:
    """A few bits near a place."""
    for _ in range(chance.randint(1, 8)):
        data[min(len(data) - 1, place + chance.randrange(16))] ^= 1 << chance.randrange(8)


def put_number(data: bytearray, place: int, others: list[bytes], chance: random.Random) -> None:
    """An extreme number."""
    data[place : place + 4] = chance.choice(EXTREMES)


def overwrite(data: bytearray, place: int, others: list[bytes], chance: random.Random) -> None:
    """Zeros, ones or noise, as where a block of a disk was never written."""
    length = min(len(data) - place, chance.choice([1, 16, 64, 512]))
    data[place : place + length] = chance.choice([bytes(length), b"\xff" * length, chance.randbytes(length)])


def lose(data: bytearray, place: int, others: list[bytes], chance: random.Random) -> None:
    """Bytes that are gone."""
    del data[place : place + chance.choice([1, 2, 16, 200])]


def double(data: bytearray, place: int, others: list[bytes], chance: random.Random) -> None:
    """Bytes that are there twice."""
    data[place:place] = data[place : place + chance.choice([1, 8, 100])]


def cut(data: bytearray, place: int, others: list[bytes], chance: random.Random) -> None:
    """An upload that broke off."""
    del data[place + 1 :]


def splice(data: bytearray, place: int, others: list[bytes], chance: random.Random) -> None:
    """A piece of another file."""
    other = chance.choice(others)
    begin = chance.randrange(len(other))
    data[place : place + 100] = other[begin : begin + 100]


DAMAGES: list[Callable[[bytearray, int, list[bytes], random.Random], None]] = [
    turn_bits, put_number, overwrite, lose, double, cut, splice
]  # fmt: skip


def mutations(seeds: dict[str, bytes], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """(name, content) of damaged files, every seed in turn."""
    names, others = list(seeds), list(seeds.values())
    for number in range(count):
        name = names[number % len(names)]
        yield f"{number}.{name}", damaged(seeds[name], others, random.Random(f"{seed}-{number}"))


def read_image(path: Path) -> None:
    """Reads an image by every way there is. Raises DataError for a named problem."""
    quick, full = image_problem(path), image_problem(path, in_full=True)
    assert full is not None or quick is None, f"the quick look finds what the full one does not: {quick}"
    image = open_image(path)
    assert full is None and image.mode == "RGB" and image.size == image_size(path), (full, image)


def read_clip(path: Path) -> None:
    """The same of a video."""
    full = video_problem(path, FRAMES, in_full=True)
    video = read_video(path, FRAMES)
    assert [frame.size for frame in video.frames] == [video.clip.size] * FRAMES, (full, video.clip)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises Hang inside after that time."""

    def ring(*_: object) -> None:
        raise Hang(f"over {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attack(read: Callable[[Path], None], files: Iterator[tuple[str, bytes]], folder: Path) -> Outcome:
    """Reads damaged files. One that is neither read nor named stays in the folder.

    Args:
        read: raises DataError for a named problem.
        files: names and contents.
        folder: where they are written.
    """
    outcome = Outcome()
    for name, content in files:
        path, began = folder / name, time.perf_counter()
        path.write_bytes(content)
        try:
            with at_most(SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(path)
            outcome.counts["read"] += 1
        except DataError as error:
            outcome.counts["named"] += 1
            if not str(error).startswith(str(path)):
                outcome.failures.append(f"{name}: a problem without its file: {error}")
        except (Exception, Hang):  # noqa: BLE001  # what is looked for
            outcome.failures.append(f"{name}: {traceback.format_exc()}")
            continue
        outcome.slowest = max(outcome.slowest, (time.perf_counter() - began, name))
        path.unlink()
    return outcome


def attack_images(count: int, folder: Path, seed: int = 0) -> Outcome:
    """Damages so many images."""
    return attack(read_image, mutations(image_seeds(), count, seed), folder)


def attack_videos(count: int, folder: Path, seed: int = 0) -> Outcome:
    """Damages so many videos."""
    return attack(read_clip, mutations(video_seeds(), count, seed), folder)


def attacks(everything: bool, folder: Path) -> dict[str, Outcome]:
    """Damaged images and videos."""
    images, videos = ALL if everything else QUICK
    return {"damaged images": attack_images(images, folder), "damaged videos": attack_videos(videos, folder)}
