# SPDX-License-Identifier: Apache-2.0
"""Our video processors beside transformers' own, whose results were recorded where torchvision is installed.

tests/golden/video_processors.npz holds, for each recipe, settings, three frames of 56 × 40 pixels, and what
transformers 5.23 with torchvision 0.28 makes of them; and `fits`: sizes that its two `smart_resize` functions choose.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from moellava.data.frame_processors import COMMON, PIXELS, UNKNOWN, FrameProcessor, pixels_of
from moellava.lmm.architecture import ARCHITECTURES
from moellava.lmm.architectures.qwen2_vl import fit_frame
from moellava.lmm.architectures.qwen3_vl import fit_video
from moellava.lmm.processors import build_without_torchvision, video_settings_of
from tests.lmm.tiny import WITH_VIDEO

GOLDEN = Path(__file__).parents[1] / "golden" / "video_processors.npz"
LEVELS = 2.2 / 255 / 0.26
"""Two levels of brightness, after normalisation: what torchvision and Pillow round differently."""


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("architecture", WITH_VIDEO)
def test_pixels_are_those_of_transformers(architecture, golden):
    recipe = ARCHITECTURES[architecture].video
    name = recipe.class_name.replace("VideoProcessor", "Processor")
    frames = [Image.fromarray(frame) for frame in golden["frames"]]
    processor = FrameProcessor(recipe, json.loads(str(golden[f"{name}/settings"])))
    made = processor([frames])
    expected = {key.split("/")[1]: torch.from_numpy(golden[key]) for key in golden if key.startswith(f"{name}/pixel")}
    expected |= {key.split("/")[1]: torch.from_numpy(golden[key]) for key in golden if key == f"{name}/video_grid_thw"}
    assert made.keys() == expected.keys() | {"video_metadata"}
    for key, value in expected.items():
        torch.testing.assert_close(made[key].float(), value.float(), rtol=0, atol=LEVELS, msg=key)
        assert float((made[key].float() - value.float()).abs().mean()) < LEVELS / 8
    alone = [processor([video]) for video in ([*frames], [*frames[::-1]])]
    both = processor([frames, frames[::-1]])
    for key in expected:
        assert torch.equal(both[key], torch.cat([one[key] for one in alone]))


@pytest.mark.parametrize("crop", [{}, {"do_center_crop": True, "crop_size": {"height": 28, "width": 28}}], ids=str)
def test_frames_are_what_the_image_processor_makes_of_them(crop):
    draw = np.random.default_rng(0)
    frames = [Image.fromarray(draw.integers(0, 256, (40, 56, 3), np.uint8)) for _ in range(3)]
    sizes = {"size": {"height": 30, "width": 62}} | crop
    options = {name: COMMON[name] for name in PIXELS} | {"do_center_crop": False} | sizes
    wanted = CLIPImageProcessorPil(**options)(frames, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels_of(COMMON, frames, **sizes), wanted)


def test_sizes_are_those_of_transformers(golden):
    for frames, height, width, least, most, *expected in golden["fits"].tolist():
        settings = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "cap_pixels_per_frame": None}
        frame = fit_frame(settings | {"size": {"shortest_edge": least, "longest_edge": most}}, frames, height, width)
        sizes = {"shortest_edge": least, "longest_edge": most * frames}
        assert [*frame, *fit_video(settings | {"size": sizes}, frames, height, width)] == expected
    with pytest.raises(ValueError, match="8000 × 20 pixels: one side is more than 200 times the other"):
        fit_frame(settings | {"size": {"shortest_edge": least, "longest_edge": most}}, 2, 20, 8000)


def test_a_cap_limits_the_pixels_of_long_videos():
    """As transformers 5.23 computes it: 4 squares of 28 × 28 pixels a video there, one square a frame here."""
    settings = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    sizes = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
    capped = settings | {"cap_pixels_per_frame": True, "size": sizes, "max_video_tokens": 4}
    assert fit_frame(capped | {"cap_pixels_per_frame": False}, 5, 48, 64) == (56, 56)
    assert fit_frame(capped, 5, 48, 64) == (28, 28)
    assert fit_video(capped | {"max_video_tokens": 1}, 5, 112, 112) == (28, 28)


def test_settings_are_found_where_transformers_looks(tmp_path):
    recipe = ARCHITECTURES["qwen2-vl"].video
    shared = {"min_pixels": 784, "max_pixels": 1568, "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 7}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(shared))
    processor = FrameProcessor(recipe, video_settings_of(tmp_path, recipe))
    assert processor.size == {"shortest_edge": 784, "longest_edge": 1568} and processor.patch_size == 7
    assert "image_processor_type" not in processor
    (tmp_path / "video_preprocessor_config.json").write_text('{"patch_size": 16, "fps": 2}')
    assert video_settings_of(tmp_path, recipe) == {"patch_size": 16, "fps": 2}
    (tmp_path / "processor_config.json").write_text('{"video_processor": {"patch_size": 32}}')
    assert video_settings_of(tmp_path, recipe) == {"patch_size": 32}
    with pytest.raises(AttributeError, match="no setting 'colour'"):
        processor.colour  # noqa: B018


def test_a_processor_without_a_recipe_keeps_its_settings_and_shows_frames(opened):
    from transformers import LlavaOnevisionProcessor

    from moellava.data.media_reader import MediaReader

    class Stranger(LlavaOnevisionProcessor):
        pass

    known = opened("llava-onevision").processor
    parts = {"image_processor": known.image_processor, "tokenizer": known.tokenizer, "num_image_tokens": 4}
    settings = {"video_processor_type": "Any", "size": {"height": 9}}
    stranger = build_without_torchvision(Stranger, UNKNOWN, video_settings=settings, **parts)
    assert dict(stranger.video_processor) == settings
    assert set(MediaReader(stranger).placeholders) == {"image"} and set(MediaReader(known).placeholders) == {
        "image",
        "video",
    }
