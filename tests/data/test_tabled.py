# SPDX-License-Identifier: Apache-2.0
"""Image processors whose last steps are looked up make the same numbers, in fewer passes."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import (
    CLIPImageProcessorPil,
    Cosmos3EdgeImageProcessorPil,
    Gemma3ImageProcessorPil,
    Glm4vImageProcessorPil,
    GotOcr2ImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
    MllamaImageProcessorPil,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
    SmolVLMImageProcessorPil,
    VideoLlama3ImageProcessorPil,
)

from moellava.data.patched import Patched
from moellava.data.resized import Resized
from moellava.data.tabled import Tabled, tabled

SQUARE = {"height": 56, "width": 56}
AREA = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
GRIDS = [[56, 112], [112, 56], [112, 112]]
WIDER = {"shortest_edge": 65536, "longest_edge": 16777216}
PROCESSORS = {
    "whole": SiglipImageProcessorPil(size=SQUARE),
    "cut": CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=SQUARE),
    "LLaVA-NeXT": LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size=SQUARE, image_grid_pinpoints=GRIDS, do_pad=True
    ),
    "LLaVA-OneVision": LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=GRIDS),
    "InternVL": GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True),
    "Gemma 3": Gemma3ImageProcessorPil(size=SQUARE),
    "Qwen2-VL": Qwen2VLImageProcessorPil(),
    "Qwen2-VL, other tones": Qwen2VLImageProcessorPil(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.1]),
    "Qwen3-VL": Qwen2VLImageProcessorPil(patch_size=16, size=WIDER, **HALVES),
    "Qwen2-VL, odd patches": Qwen2VLImageProcessorPil(patch_size=7, merge_size=3, temporal_patch_size=3),
    "Qwen2-VL, small": Qwen2VLImageProcessorPil(temporal_patch_size=1, min_pixels=28 * 28, max_pixels=80 * 80),
    "GLM-4.1V": Glm4vImageProcessorPil(),
    "VideoLLaMA 3": VideoLlama3ImageProcessorPil(),
    "Cosmos 3 Edge": Cosmos3EdgeImageProcessorPil(),
    "Llama 3.2": MllamaImageProcessorPil(size=SQUARE),
    "SmolVLM": SmolVLMImageProcessorPil(),
}
"""What a processor does to a picture -> one of transformers that does it."""

PATCHED = {name for name in PROCESSORS if name.startswith(("Qwen", "GLM", "VideoLLaMA"))}
"""Those that cut patches of the layout that is known; the patches of Cosmos 3 Edge are another."""


def picture(wide: int, high: int) -> Image.Image:
    draw = np.random.default_rng(wide)
    return Image.fromarray(draw.integers(0, 256, (high, wide, 3), np.uint8))


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_same_to_the_bit_of_any_shape(name):
    plain = PROCESSORS[name]
    fast = tabled(plain)
    assert isinstance(fast, Tabled) and isinstance(fast, type(plain))
    for size in ((56, 56), (300, 41), (33, 210), (640, 480)):
        wanted, found = (one([picture(*size)], return_tensors="pt") for one in (plain, fast))
        assert wanted.keys() == found.keys()
        assert all(np.array_equal(wanted[key], found[key]) for key in wanted), size
        assert found["pixel_values"].dtype == wanted["pixel_values"].dtype


@pytest.mark.parametrize("name", [*sorted(PATCHED), "Cosmos 3 Edge"])
def test_patches_are_cut_of_bytes_where_that_is_the_same(name, monkeypatch):
    """Of several pictures at a time; no float is resized, cut or copied."""
    plain = PROCESSORS[name]
    fast, pictures = tabled(plain), [picture(*size) for size in ((56, 56), (300, 41), (640, 480))]
    assert isinstance(fast, Patched) == (name in PATCHED)
    wanted = plain(pictures, return_tensors="pt")
    if name in PATCHED:
        monkeypatch.setattr(type(plain), "patchify", lambda *_: pytest.fail("cut again"))
    found = fast(pictures, return_tensors="pt")
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[key], found[key]) for key in wanted)


@pytest.mark.parametrize(
    "options", [{"return_tensors": "np"}, {"do_normalize": False, "return_tensors": "pt"}], ids=str
)
def test_what_is_asked_for_in_another_way_is_left_to_the_processor(options):
    plain = PROCESSORS["Qwen2-VL"]
    wanted, found = (one([picture(80, 90)], **options)["pixel_values"] for one in (plain, tabled(plain)))
    assert type(wanted) is type(found) and np.array_equal(wanted, found)


class Negative(Qwen2VLImageProcessorPil):
    """Colours have a way of their own into RGB."""

    def convert_to_rgb(self, image, **options):
        shown = super().convert_to_rgb(image, **options)
        return ImageOps.invert(shown) if isinstance(shown, Image.Image) else 255 - shown  # older releases have Pillow's


def transparent(made: Image.Image) -> Image.Image:
    made.info["transparency"] = made.getpixel((0, 0))
    return made


@pytest.mark.parametrize("plain", [Negative(), PROCESSORS["Qwen2-VL"], PROCESSORS["LLaVA-OneVision"]])
@pytest.mark.parametrize(
    "shown", [picture(80, 90), transparent(picture(80, 90)), picture(80, 90).convert("L"), np.asarray(picture(80, 90))]
)
def test_a_picture_is_resized_as_it_came_where_nothing_was_made_of_it(plain, shown):
    fast = tabled(plain)
    assert isinstance(fast, Resized)
    wanted, found = (one([shown], return_tensors="pt")["pixel_values"] for one in (plain, fast))
    assert torch.equal(wanted, found)


@pytest.mark.parametrize("name", ["whole", "Qwen2-VL"])
def test_floats_go_the_usual_way(name):
    plain = PROCESSORS[name]
    tones = np.random.default_rng(0).random((3, 56, 56)).astype(np.float32)
    options = {"do_rescale": False, "return_tensors": "pt"}
    wanted, found = (one([tones], **options)["pixel_values"] for one in (plain, tabled(plain)))
    assert torch.equal(wanted, found)


def test_it_is_copied_and_sent_to_workers_and_what_is_saved_is_the_plain_one():
    plain = PROCESSORS["Qwen2-VL"]
    before = plain.to_dict()
    fast = tabled(plain)
    wanted = plain([picture(80, 90)], return_tensors="pt")["pixel_values"]
    for again in (pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast)):
        assert isinstance(again, Tabled)
        assert torch.equal(again([picture(80, 90)], return_tensors="pt")["pixel_values"], wanted)
    assert plain.to_dict() == before and not isinstance(plain, Tabled)


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"height": 28, "width": 28}},
        {"image_mean": [0.1, 0.2, 0.3]},
        {"image_std": [0.1, 0.2, 0.3]},
        {"rescale_factor": 1 / 127},
        {"do_normalize": False},
        {"do_rescale": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [SiglipImageProcessorPil, Qwen2VLImageProcessorPil])
def test_a_setting_that_is_changed_later_acts(change, cls):
    size = SQUARE if cls is SiglipImageProcessorPil else AREA
    if cls is Qwen2VLImageProcessorPil and "size" in change:
        change = {"size": {"shortest_edge": 784, "longest_edge": 3136}}
    plain = cls(size=size)
    fast = tabled(plain)
    for name, value in change.items():
        setattr(plain, name, value)
    wanted = cls(**{"size": size} | change)([picture(80, 90)], return_tensors="pt")
    assert torch.equal(fast([picture(80, 90)], return_tensors="pt")["pixel_values"], wanted["pixel_values"])


class Brighter(SiglipImageProcessorPil):
    def normalize(self, image, mean, std, **options):
        return super().normalize(image, mean, std, **options) + 1


class Between(SiglipImageProcessorPil):
    """Something else is done between the two steps."""

    def _preprocess(self, images, **options):
        rescaled = [self.rescale(image, 1 / 255) * 0.5 for image in images]
        return {"pixel_values": torch.tensor(np.stack([self.normalize(one, 0.5, 0.5) for one in rescaled]))}


@pytest.mark.parametrize(
    "plain",
    [Brighter(), Between(), SiglipImageProcessorPil(do_normalize=False), SiglipImageProcessorPil(do_rescale=False)],
    ids=lambda plain: type(plain).__name__,
)
def test_other_steps_stay_as_they_are(plain):
    assert tabled(plain) is plain
