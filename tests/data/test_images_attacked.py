# SPDX-License-Identifier: Apache-2.0
"""Images and videos as users have them: on their side, transparent, of many bits, enormous, damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from moellava.cli import main
from moellava.data.decoding import DECODER_ERRORS
from moellava.data.images import Limits, image_problem, image_size, normalised, open_image
from moellava.data.media import MediaFiles
from moellava.data.records import Medium
from moellava.data.video import probe_video, read_frames, video_problem
from moellava.errors import BadFileError, UserError
from tests.attacks.media import QUICK, attack_images, attack_videos, filmed, picture
from tests.processes import run_python

LAYOUTS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}, "JPEG": {}, "AVIF": {}}
"""Formats with EXIF -> options of writing."""


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def png(width: int, height: int, depth: int = 1, colour: int = 0, data: bytes = b"", more: bytes = b"") -> bytes:
    """A PNG file with a head, further chunks, and whatever data."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))]
    chunks += [(b"tRNS", more)] if more else []
    chunks += [(b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    written = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


# -- as a viewer shows them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("orientation", range(10))
def test_an_image_is_upright_and_its_head_says_so(layout, orientation, tmp_path):
    exif, path = Image.Exif(), tmp_path / f"image.{layout.lower()}"
    exif[ExifTags.Base.Orientation] = orientation
    picture().save(path, layout, exif=exif, **LAYOUTS[layout])
    shown = open_image(path)
    with Image.open(path) as image:
        image.load()
        assert pixels(shown).tolist() == pixels(ImageOps.exif_transpose(image)).tolist()
    assert shown.size == image_size(path) == ((32, 48) if 5 <= orientation <= 8 else (48, 32))
    assert normalised(shown) is shown, "nobody turns it again"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_turns_nothing(tmp_path):
    picture().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(8))
    assert open_image(tmp_path / "a.jpg").size == image_size(tmp_path / "a.jpg") == (48, 32)


def transparent(mode: str) -> Image.Image:
    """Black, all of it transparent but one pixel."""
    if mode == "P":
        image = Image.new("P", (4, 4), 1)
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.putpixel((1, 1), 0)
        image.info["transparency"] = 1
        return image
    image = Image.new("RGBA" if mode.startswith("RGB") else "PA" if mode == "PA" else "LA", (4, 4), 0)
    image.putpixel((1, 1), (0, 0, 0, 255)[-image.im.bands :] if mode != "PA" else (0, 255))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "P", "PA"])
def test_what_is_transparent_lies_on_white(mode):
    shown = normalised(transparent(mode))
    assert shown.mode == "RGB" and shown.getpixel((1, 1)) == (0, 0, 0)
    assert sorted({shown.getpixel((x, y)) for x in range(4) for y in range(4)}) == [(0, 0, 0), (255, 255, 255)]


def test_half_transparent_is_half_white():
    assert normalised(Image.new("RGBA", (1, 1), (255, 0, 0, 51))).getpixel((0, 0)) == (255, 204, 204)


@pytest.mark.parametrize(
    "depth, colour, key, data",
    [
        (8, 0, b"\0\7", b"\0\7\11"),
        (8, 2, b"\0\7\0\7\0\7", b"\0\7\7\7\11\11\11"),
        (16, 0, b"\3\7", b"\0\3\7\0\0"),
    ],
)
def test_a_tone_or_colour_may_stand_for_transparency(depth, colour, key, data, tmp_path):
    (tmp_path / "a.png").write_bytes(png(2, 1, depth, colour, data, key))
    shown = open_image(tmp_path / "a.png")
    assert shown.getpixel((0, 0)) == (255, 255, 255) and max(shown.getpixel((1, 0))) < 10


RAMP = np.tile(np.arange(256), (2, 1))


@pytest.mark.parametrize(
    "values",
    [
        (RAMP * 257).astype("<u2"),
        (RAMP * 257).astype("i4"),
        (RAMP + 0).astype("i4"),
        (RAMP * 1000 - 2**17).astype("i4"),
        (RAMP / 255).astype("f4"),
        (RAMP + 0.0).astype("f4"),
        (RAMP * 257).astype("f4"),
        (RAMP / 1000 - 0.1).astype("f4"),
    ],
)
def test_more_bits_keep_their_tones(values):
    mode = "I;16" if values.dtype.itemsize == 2 else {"i": "I", "f": "F"}[values.dtype.kind]
    image = Image.frombytes(mode, (256, 2), values.tobytes())
    assert pixels(normalised(image))[..., 1].tolist() == RAMP.tolist()


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big.tif", "a.pgm"])
def test_files_of_sixteen_bits_keep_their_tones(name, tmp_path):
    mode = "I;16B" if name == "big.tif" else "I" if name == "a.pgm" else "I;16"
    order = {"I;16B": ">u2", "I;16": "<u2", "I": "<i4"}[mode]
    Image.frombytes(mode, (256, 2), (RAMP * 257).astype(order).tobytes()).save(tmp_path / name)
    assert pixels(open_image(tmp_path / name))[..., 0].tolist() == RAMP.tolist()


def test_a_dark_image_of_sixteen_bits_stays_dark():
    image = Image.frombytes("I;16", (256, 2), RAMP.astype("<u2").tobytes())
    assert not pixels(normalised(image)).any()


def test_floats_that_are_no_numbers_are_white_and_change_nothing_else():
    values = np.array([[0, 0.5, 1, np.nan, np.inf, -np.inf]], "f4")
    image = Image.frombytes("F", (6, 1), values.tobytes())
    assert pixels(normalised(image))[0, :, 0].tolist() == [0, 128, 255, 255, 255, 255]
    assert normalised(Image.new("F", (2, 2), float("nan"))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_converted_as_ever(mode):
    image = picture(mode)
    assert pixels(normalised(image)).tolist() == pixels(image.convert("RGB")).tolist()


def test_of_an_animation_it_is_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.png", "a.webp", "a.tif"):
        options = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert open_image(tmp_path / name).getpixel((4, 4)) == (255, 0, 0)


def test_an_image_that_is_open_is_shown_the_same_way(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture("RGBA").save(tmp_path / "a.png", exif=exif)
    files = MediaFiles(tmp_path)
    with Image.open(tmp_path / "a.png") as image:
        medium = Medium("image", image)
        assert files.size(medium) == (32, 48)
        assert pixels(files.read(medium)).tolist() == pixels(files.read(Medium("image", "a.png"))).tolist()
    with pytest.raises(BadFileError, match="the image: 1 × 10000 pixels, but --max_aspect_ratio is 200"):
        files.read(Medium("image", Image.new("L", (1, 10000))))


# -- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, words",
    [
        ((1, 10_000), "1 × 10000 pixels, but --max_aspect_ratio is 200"),
        ((20_100, 100), "20100 × 100 pixels, but --max_aspect_ratio is 200"),
        ((30_001, 4_000), "30001 × 4000 pixels, but --max_image_side is 30000"),
        ((13_400, 13_400), "--max_image_pixels 178956970"),
        ((60_000, 60_000), "--max_image_pixels 178956970"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest undoes our own filter
@pytest.mark.parametrize("in_full", [False, True])
def test_limits_are_looked_at_before_anything_is_decoded(size, words, in_full, tmp_path):
    """The file has no pixels at all: who decoded it would say so."""
    (tmp_path / "a.png").write_bytes(png(*size))
    assert image_problem(tmp_path / "a.png", in_full).startswith(f"{tmp_path / 'a.png'}: ")
    assert words in image_problem(tmp_path / "a.png", in_full)
    for look in (open_image, image_size):
        with pytest.raises(BadFileError, match=words):
            look(tmp_path / "a.png")


def test_limits_can_be_moved_both_ways(tmp_path):
    wide = Limits(pixels=10**9, side=60_000, aspect_ratio=float("inf"))
    for size in ((1, 10_000), (30_001, 4_000), (20_000, 20_000)):
        (tmp_path / "a.png").write_bytes(png(*size))
        assert image_problem(tmp_path / "a.png", limits=wide) is None
        assert image_size(tmp_path / "a.png", wide) == size
    picture().save(tmp_path / "b.png")
    for limits in (Limits(pixels=48 * 32 - 1), Limits(side=47), Limits(aspect_ratio=1.4)):
        assert "48 × 32 pixels, but --max_" in image_problem(tmp_path / "b.png", limits=limits)
    assert image_problem(tmp_path / "b.png", True, Limits(48 * 32, 48, 1.5)) is None


@pytest.mark.parametrize("values", [{"pixels": 0}, {"side": -1}, {"aspect_ratio": 0.5}, {"aspect_ratio": float("nan")}])
def test_a_limit_that_allows_nothing_is_refused(values):
    with pytest.raises(UserError, match="--max_.*a limit is at least 1"):
        Limits(**values)


def test_pillow_warns_of_no_large_image(tmp_path):
    """In a process of its own, which no test framework keeps warnings from."""
    (tmp_path / "a.png").write_bytes(png(10_000, 10_000))
    code = """
import sys, warnings
sys.stderr = sys.stdout
from moellava.data.images import Limits, image_problem, image_size
print(image_size(sys.argv[1]), image_problem(sys.argv[1]))
"""
    assert run_python(code, tmp_path / "a.png", fresh=True).splitlines() == ["(10000, 10000) None"]


def test_limits_are_flags_of_check_data(tmp_path, data_file, make_record, capsys):
    picture().save(tmp_path / "a.png")
    words = ["check-data", str(data_file([make_record("a", "<image>", "b", image="a.png")]))]
    words += ["--image-folder", str(tmp_path)]
    assert main(words) == 0
    assert main([*words, "--max-image-pixels", "1000"]) == 1
    assert "a.png: 48 × 32 pixels, but --max_image_pixels is 1000" in capsys.readouterr().out
    assert main([*words, "--max-image-side", "40"]) == main([*words, "--max-aspect-ratio", "1.2"]) == 1
    for nothing in ("nan", "inf", "0", "-1"):
        with pytest.raises(SystemExit):
            main([*words, "--max-aspect-ratio", nothing])
        assert f"--max_aspect_ratio: {nothing}: a number above 0 is needed" in capsys.readouterr().err


# -- damage --------------------------------------------------------------------------------------------------------


def write_hole(path: Path) -> None:
    """An image whose head and ending are sound, with zeros between them."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), "u1")
    Image.fromarray(noise).save(path)
    content = bytearray(path.read_bytes())
    content[1000:1100] = bytes(100)
    path.write_bytes(content)


def test_a_hole_is_found_in_full(tmp_path):
    write_hole(tmp_path / "hole.png")
    assert image_problem(tmp_path / "hole.png") is None
    assert "hole.png: the image cannot be read" in image_problem(tmp_path / "hole.png", in_full=True)
    with pytest.raises(BadFileError):
        open_image(tmp_path / "hole.png")


def test_a_hole_that_decodes_is_found_by_its_checksum(tmp_path):
    """Pillow itself shows such pixels in black."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "hole.png", compress_level=0)
    content = bytearray((tmp_path / "hole.png").read_bytes())
    content[1000:1100] = bytes(100)
    (tmp_path / "hole.png").write_bytes(content)
    with pytest.raises(BadFileError, match="checksum"):
        open_image(tmp_path / "hole.png")


@pytest.mark.parametrize("error", DECODER_ERRORS)
def test_whatever_a_decoder_raises_is_a_problem_of_its_file(error, tmp_path, monkeypatch, clips):
    import av

    def give_up(*_: object, **__: object) -> None:
        raise error

    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", give_up)
    monkeypatch.setattr(av, "open", give_up)
    assert image_problem(tmp_path / "a.png").startswith(f"{tmp_path / 'a.png'}: the image cannot be read: ")
    assert error.__name__ in image_problem(tmp_path / "a.png")
    clip = clips / "shapes.mp4"
    assert video_problem(clip, 2) == f"{clip}: the video cannot be read: {error.__name__}"


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for problem in (image_problem, lambda path: video_problem(path, 2)):
        assert problem(tmp_path / "pipe.png") == f"{tmp_path}/pipe.png: is a pipe or a device, not a file"
        assert problem(tmp_path) == f"{tmp_path}: is a folder, not a file"
        assert f"{tmp_path}/gone: no such" in problem(tmp_path / "gone")


def test_damaged_images_are_read_or_named(tmp_path):
    outcome = attack_images(QUICK[0], tmp_path)
    assert not outcome.failures, outcome.failures[0]
    assert outcome.counts.total() == QUICK[0] and min(outcome.counts.values()) > QUICK[0] / 10


def test_damaged_videos_are_read_or_named(tmp_path):
    outcome = attack_videos(QUICK[1], tmp_path)
    assert not outcome.failures, outcome.failures[0]
    assert outcome.counts.total() == QUICK[1] and min(outcome.counts.values()) > QUICK[1] / 10


def test_a_title_of_any_encoding_keeps_no_video_from_being_read(tmp_path):
    content = filmed("mkv", "libx264", "yuv420p", {})
    title = "Grüße vom Bodensee".encode()
    assert content.count(title) == 1
    (tmp_path / "a.mkv").write_bytes(content.replace(title, title.replace("üß".encode(), b"\xfc\xdf\xff\xfe")))
    assert video_problem(tmp_path / "a.mkv", 2, in_full=True) is None


def test_limits_hold_for_the_frames_of_a_video(clips):
    for limits in (Limits(pixels=1000), Limits(side=80), Limits(aspect_ratio=1.5)):
        assert "wide.mp4: 96 × 48 pixels, but --max_" in video_problem(clips / "wide.mp4", 2, limits=limits)
        files = MediaFiles(clips, num_frames=2, limits=limits)
        with pytest.raises(BadFileError, match="96 × 48 pixels"):
            files.read(Medium("video", "wide.mp4"))


def test_frames_of_a_video_are_of_one_size(tmp_path):
    """A recording may change its size as it goes on: two streams of MPEG one after the other."""
    import av

    for name, size in (("a.ts", (48, 32)), ("b.ts", (64, 64))):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("mpeg2video", rate=25)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            for _ in range(4):
                container.mux(stream.encode(av.VideoFrame.from_image(picture(size=size))))
            container.mux(stream.encode())
    (tmp_path / "both.ts").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    clip = dataclasses.replace(probe_video(tmp_path / "both.ts", 2), indices=(0, 3, 4, 6))
    video = read_frames(tmp_path / "both.ts", clip)
    assert clip.total == 8 and {frame.size for frame in video.frames} == {clip.size} == {(48, 32)}


def test_check_data_says_what_is_wrong_with_every_file(tmp_path, data_file, make_record, capsys):
    write_hole(tmp_path / "hole.png")
    (tmp_path / "long.png").write_bytes(png(1, 10_000))
    rows = [make_record(name, "<image>", "a", image=f"{name}.png") for name in ("hole", "long", "gone")]
    assert main(["check-data", str(data_file(rows)), "--image-folder", str(tmp_path), "--json"]) == 1
    texts = [problem["text"] for problem in json.loads(capsys.readouterr().out)["problems"]]
    for name, text, words in zip(
        ("hole", "long", "gone"), texts, ("cannot be read", "--max_aspect", "no such"), strict=True
    ):
        assert f"Record {name} of" in text and f"{name}.png" in text and words in text
