# SPDX-License-Identifier: Apache-2.0
"""LLaVA's helpers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from moellava.data.tokenizers import load_tokenizer
from moellava.mm_utils import expand2square, pixel_values, process_images, tokenizer_image_token


@pytest.fixture(scope="module")
def processor():
    return CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})


def test_image_tokens_stand_between_texts_and_bos_comes_once(golden_tokenizers):
    tokenizer = load_tokenizer(golden_tokenizers / "mistral")
    hello, image = tokenizer("hello").input_ids[1:], [-200]
    assert tokenizer_image_token("<image>hello<image><image>", tokenizer) == [1, *image, *hello, *image, *image]
    ids = tokenizer_image_token("hello<image>", tokenizer, image_token_index=-7, return_tensors="pt")
    assert ids.dtype == torch.long and ids.tolist() == [1, *hello, -7]
    with pytest.raises(ValueError, match="'np'"):
        tokenizer_image_token("hello", tokenizer, return_tensors="np")


def test_a_tokenizer_without_bos(golden_tokenizers):
    tokenizer = load_tokenizer(golden_tokenizers / "phi")
    assert tokenizer_image_token("a<image>b", tokenizer) == [64, -200, 65]
    assert tokenizer_image_token("<image>", tokenizer) == [-200]


@pytest.mark.parametrize("size", [(6, 2), (2, 6), (5, 5), (5, 2)])
def test_padding_to_a_square_keeps_the_image_in_the_middle(size):
    square = expand2square(Image.new("RGB", size, (255, 0, 0)), (0, 0, 9))
    side = max(size)
    assert square.size == (side, side)
    red = sum(pixel == (255, 0, 0) for pixel in square.getdata())
    assert red == size[0] * size[1] and square.getpixel((side // 2, side // 2)) == (255, 0, 0)
    if size[0] != size[1]:
        assert square.getpixel((0, 0)) == (0, 0, 9)


def test_pad_shows_what_square_crops(processor):
    image = Image.new("RGB", (32, 8), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 4, 8))
    cropped = process_images([image], processor, SimpleNamespace())
    padded = process_images([image], processor, SimpleNamespace(image_aspect_ratio="pad"))
    assert cropped.shape == padded.shape == (1, 3, 8, 8)
    assert cropped.max() < 0 < padded.max()
    assert padded[0, :, 0, 4].abs().max() < 0.02, "the padding is the mean colour, zero once normalised"


def test_images_of_all_modes_and_shapes(processor):
    images = [Image.new("L", (9, 4)), Image.new("RGBA", (4, 9)), Image.new("P", (8, 8)), Image.new("RGB", (1, 30))]
    assert pixel_values(images, processor, "pad").shape == (4, 3, 8, 8)
    with pytest.raises(ValueError, match="anyres.*square, pad"):
        pixel_values(images, processor, "anyres")
