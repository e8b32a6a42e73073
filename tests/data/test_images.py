# SPDX-License-Identifier: Apache-2.0
"""Image files, good and bad."""

from __future__ import annotations

import pytest
from PIL import Image

from moellava.data.images import image_problem, open_image
from moellava.errors import DataError

BAD = {
    "cut.png": "cannot be read",
    "cut.jpg": "cannot be read",
    "text.png": "not an image",
    "empty.png": "not an image",
    "missing.png": "no such image file",
}


@pytest.mark.parametrize("name", ["a.png", "sub/b.jpg"])
def test_good_images_open_in_rgb(image_tree, name):
    image = open_image(image_tree / name)
    assert image.mode == "RGB" and image.size == (64, 40)
    assert image_problem(image_tree / name) is image_problem(image_tree / name, in_full=True) is None


@pytest.mark.parametrize("in_full", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_named(image_tree, name, in_full):
    with pytest.raises(DataError, match=BAD[name]):
        open_image(image_tree / name)
    problem = image_problem(image_tree / name, in_full)
    assert problem is not None and name in problem and BAD[name] in problem


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16"])
def test_any_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, (5, 4)).save(path)
    assert open_image(path).mode == "RGB"


def test_bytes_behind_the_ending_are_no_problem(image_tree, tmp_path):
    (tmp_path / "long.jpg").write_bytes((image_tree / "sub" / "b.jpg").read_bytes() + b"maker note " * 20)
    assert image_problem(tmp_path / "long.jpg") is None


def test_damage_in_the_middle_is_found_in_full(image_tree, tmp_path):
    content = bytearray((image_tree / "a.png").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "broken.png").write_bytes(bytes(content))
    assert image_problem(tmp_path / "broken.png") is None, "the quick look reads head and ending alone"
    assert "broken.png" in str(image_problem(tmp_path / "broken.png", in_full=True))


def test_a_folder_is_no_image(tmp_path):
    assert image_problem(tmp_path) is not None
