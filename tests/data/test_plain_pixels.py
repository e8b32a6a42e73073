# SPDX-License-Identifier: Apache-2.0
"""A plain image processor's work without its detours: the same to the bit, and only where it is known to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    PixtralImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from moellava.data.media import MediaFiles
from moellava.data.plain_pixels import plain_pixels
from moellava.data.records import Medium

SQUARE = {"height": 30, "width": 30}


@pytest.fixture
def pictures() -> list[Image.Image]:
    draw, sizes = (
        np.random.default_rng(1),
        ((64, 48), (33, 50), (121, 7), (30, 30), (5, 9), (30, 11), (200, 151), (7, 6)),
    )
    return [Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8)) for width, height in sizes]


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size=SQUARE),
        CLIPImageProcessorPil(size={"shortest_edge": 41}, crop_size={"height": 30, "width": 22}, do_normalize=False),
        CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size=SQUARE, rescale_factor=1 / 127.5, resample=2),
        SiglipImageProcessorPil(size=SQUARE),
        ViTImageProcessorPil(size={"height": 20, "width": 30}),
        LlavaImageProcessorPil(size={"shortest_edge": 30}, crop_size=SQUARE, do_pad=True),
        LlavaImageProcessorPil(size=SQUARE, do_center_crop=False, do_pad=True, image_mean=[0.5, 0.2, 0.9]),
        LlavaImageProcessorPil(size={"shortest_edge": 30}, crop_size=SQUARE),
    ],
)
def test_pixels_are_the_same_to_the_bit(processor, pictures):
    plain = plain_pixels(processor)
    assert torch.equal(plain(pictures), processor(pictures, return_tensors="pt")["pixel_values"])


RESIZE = Image.Image.resize


def columns_first(self, size, *args, **options):
    """As Pillow 13 resizes a high picture (its pull request 9549); at 12 it begins with the rows of any."""
    first = RESIZE(self, (self.width, size[1]), *args, **options) if self.height > self.width else self
    return RESIZE(first, size, *args, **options)


@pytest.mark.parametrize("resize", [RESIZE, columns_first])
@pytest.mark.parametrize("side", [30, 42, 100, 336])
def test_high_pictures_are_padded_without_their_background_being_resized(side, resize, monkeypatch):
    """Of many shapes; at the sides of which columns meet often, less than the square is resized."""
    draw, shapes = np.random.default_rng(2), []
    processor = LlavaImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_pad=True
    )
    plain = plain_pixels(processor)
    heights = [draw.integers(2, 700) for _ in range(8)] + [
        side * n // 6 for n in (7, 8, 9, 12, 18, 24) if n * side < 4000
    ]
    pictures = [
        Image.fromarray(draw.integers(0, 256, (height, max(1, int(height * share)), 3), np.uint8))
        for height in heights
        for share in (0.1, 0.5, 0.8)
    ]
    expected = processor(pictures, return_tensors="pt")["pixel_values"]
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: shapes.append(self.size) or resize(self, *a, **k))
    assert torch.equal(plain(pictures), expected)
    assert sum(width < height for width, height in shapes) > len(pictures) // 4


@pytest.mark.parametrize(
    "processor",
    [
        LlavaNextImageProcessorPil(),
        PixtralImageProcessorPil(),
        CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size=SQUARE),
        CLIPImageProcessorPil(do_resize=False),
        LlavaImageProcessorPil(size={"height": 20, "width": 30}, do_center_crop=False, do_pad=True),
        SiglipImageProcessorPil(size=SQUARE, do_pad=True),
    ],
)
def test_what_does_more_is_left_to_itself(processor):
    assert plain_pixels(processor) is None


def test_a_class_with_a_step_of_its_own_is_left_to_itself():
    class Darker(SiglipImageProcessorPil):
        def rescale(self, image, scale, **kwargs):
            return super().rescale(image // 2, scale, **kwargs)

    class Sharper(SiglipImageProcessorPil):
        def __call__(self, images, **kwargs):
            return super().__call__([image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images], **kwargs)

    assert plain_pixels(Darker(size=SQUARE)) is None
    assert plain_pixels(Sharper(size=SQUARE)) is None


def test_the_reader_takes_this_way(reader, image_tree, monkeypatch):
    images = [MediaFiles(image_tree).read(Medium("image", "a.png"))] * 2
    expected = reader.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    monkeypatch.setattr(type(reader.processor.image_processor), "__call__", None)
    assert torch.equal(reader.read([images[:1], images[1:]]).tensors["pixel_values"], expected)
