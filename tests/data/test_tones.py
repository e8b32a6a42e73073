# SPDX-License-Identifier: Apache-2.0
"""Pixels and the tones that they come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from moellava.data.tones import Tones, tones_of
from moellava.model.tower_images import joined

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [10.0, 20.0, 30.0]},
        {"image_std": [-0.1, 9.0, 1e-4]},
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [CLIPImageProcessorPil, SiglipImageProcessorPil])
def test_tones_say_all_of_what_a_processor_gives(cls, settings):
    processor = cls(**settings)
    pixels = processor([PICTURE], return_tensors="pt")["pixel_values"]
    tones = tones_of(processor)
    coded = tones.of(pixels)
    assert coded.dtype == torch.uint8 and torch.equal(tones.pixels(coded.numpy()), pixels)


def test_every_tone_of_every_channel_comes_back():
    tones = Tones(CLIPImageProcessorPil())
    every = torch.arange(256, dtype=torch.uint8).expand(1, 3, 16, -1)
    assert torch.equal(tones.of(tones.pixels(every.numpy())), every)


@pytest.mark.parametrize("pixels", [0, 1, 6, 49, 196, 120_001])
@pytest.mark.parametrize("times", [1, 3])
def test_patches_are_looked_up_and_repeated(pixels, times):
    """One tone at a time or two, in one block or in several."""
    tones = Tones(CLIPImageProcessorPil())
    patches = np.random.default_rng(0).integers(0, 256, (600 if pixels < 1000 else 2, 3, pixels), np.uint8)
    planes = np.stack([row[patches[:, channel]] for channel, row in enumerate(tones.table)], 1)
    expected = np.repeat(planes[:, :, None], times, 2).reshape(len(patches), -1)
    assert np.array_equal(tones.repeated(patches, times).numpy(), expected)
    if times == 1:
        assert np.array_equal(tones.patches(patches[:, :, None]).numpy(), planes[:, :, None])


@pytest.mark.parametrize("value", [0.123456, float("nan"), float("inf"), -99.0])
def test_what_is_no_tone_is_found(value):
    tones = Tones(CLIPImageProcessorPil())
    pixels = tones.pixels(np.zeros((1, 3, 4, 4), np.uint8))
    pixels[0, 1, 2, 3] = value
    assert tones.of(pixels) is None


def test_where_all_tones_look_alike_there_are_none():
    assert Tones(CLIPImageProcessorPil(rescale_factor=0.0)).of(torch.zeros(1, 3, 2, 2)) is None


def test_processors_without_steps_of_their_own_have_none():
    assert tones_of(CLIPImageProcessorPil(do_rescale=False, do_normalize=False)) is None
    assert tones_of(joined([CLIPImageProcessorPil(), SiglipImageProcessorPil()])) is None
    assert tones_of(object()) is None
