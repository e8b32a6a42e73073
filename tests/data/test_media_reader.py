# SPDX-License-Identifier: Apache-2.0
"""What a composed model's processor makes of images: one run for all, and the pixels of LLaVA's own steps."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import LlavaProcessor

from moellava.data.media import MediaFiles
from moellava.data.media_reader import MediaReader, blank
from moellava.data.records import Medium
from moellava.errors import BadFileError, DataError, UserError
from moellava.mm_utils import pixel_values
from moellava.model.tower_images import tower_image_processor
from moellava.vlm import VLM
from tests.tiny import compose_tiny

PATCHES = 4
SIZES = [(1, 1), (1, 100), (100, 1), (64, 40), (40, 64), (500, 3), (3, 500), (28, 28), (29, 27), (57, 333), (336, 336)]


def picture(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Noise with a gradient over it, in which every shift and every rounding shows."""
    noise = Image.merge("RGB", [Image.effect_noise(size, 90 + 20 * channel) for channel in range(3)])
    gradient = Image.linear_gradient("L").resize(size).convert("RGB")
    return Image.blend(noise, gradient, 0.4).convert(mode)


@pytest.fixture(scope="module", params=["clip-square", "clip-pad", "siglip-square", "siglip-pad"])
def made(request, make_base) -> tuple[VLM, torch.nn.Module, str]:
    """A composed model, its tower's own image processor, and its aspect ratio."""
    name, ratio = request.param.split("-")
    tower = request.getfixturevalue(f"{name}_tower")
    vlm = compose_tiny(make_base("llama").folder, tower, "v1", image_aspect_ratio=ratio)
    return vlm, tower_image_processor(tower, vlm.model.config.vision_config), ratio


def test_every_image_is_one_run(made):
    vlm, _, _ = made
    reader = vlm.reader
    assert reader.fixed_run is not None and not reader.needs_sizes and not reader.reads_videos
    assert reader.fixed_run.ids == [vlm.model.config.image_token_id] * PATCHES and not reader.fixed_run.extras
    assert reader.placeholder_id == vlm.model.config.image_token_id
    assert [reader.run_length(size, count) for size in SIZES for count in (1, 3)] == [PATCHES] * 2 * len(SIZES)
    assert reader.spelled == "<image>", "nothing of a prompt is written by the processor"


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_are_those_of_llavas_own_steps(made, size):
    vlm, own, ratio = made
    image = picture(size)
    read = vlm.reader.read([[image]])
    wanted = pixel_values([image], own, ratio)
    assert read.tensors.keys() == {"pixel_values"} and wanted.shape == (1, 3, 28, 28)
    assert torch.equal(read.tensors["pixel_values"], wanted)


def test_images_of_a_batch_come_in_order(made):
    vlm, own, ratio = made
    images = [picture(size) for size in SIZES]
    read = vlm.reader.read([images[:3], images[3:4], images[4:]])
    assert [len(runs) for runs in read.runs] == [3, 1, len(images) - 4]
    assert torch.equal(read.tensors["pixel_values"], pixel_values(images, own, ratio))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_images_that_are_open_already_may_be_of_any_mode(made, mode):
    vlm, own, ratio = made
    image = Image.new("I;16", (40, 64), 3000) if mode == "I;16" else picture((40, 64), mode)
    read = vlm.reader.read([[MediaFiles().read(Medium("image", image))]])
    assert torch.equal(read.tensors["pixel_values"], pixel_values([image], own, ratio))


def test_a_blank_image_is_black(made):
    vlm, own, ratio = made
    read = vlm.reader.read([[blank("image")]])
    assert torch.equal(read.tensors["pixel_values"], pixel_values([Image.new("RGB", (56, 56))], own, ratio))


def test_the_processor_alone_makes_the_same_of_a_prompt(made):
    """A folder of ours in plain transformers reads what training read."""
    vlm, _, _ = made
    images = [picture((64, 40)), picture((3, 50))]
    output = vlm.processor(text="<image> or <image>?", images=images, return_tensors="pt")
    assert torch.equal(output["pixel_values"], vlm.reader.read([images]).tensors["pixel_values"])
    assert (output["input_ids"] == vlm.reader.placeholder_id).sum() == 2 * PATCHES


def test_what_a_processor_cannot_take_is_told_by_name(reader, monkeypatch):
    def refuse(images, **_):
        raise ValueError("too thin")

    monkeypatch.setattr(reader.processor, "image_processor", refuse)
    monkeypatch.setattr(reader, "_plain", refuse)
    with pytest.raises(DataError, match=r"Record 7: the processor cannot take images of \[\(5, 4\)\] pixels: too thin"):
        reader.read([[picture((5, 4))]], "Record 7")


def test_a_tokenizer_without_the_placeholder_is_refused(processor, tokenizers, monkeypatch):
    monkeypatch.setattr(processor, "tokenizer", tokenizers["phi"])
    with pytest.raises(UserError, match="LlavaProcessor has no special token '<image>'"):
        MediaReader(processor)


class WrappedProcessor(LlavaProcessor):
    """Takes no placeholder that does not stand between its two tokens, as HunYuan-VL's."""

    image_start_token, image_end_token = "<im_start>", "<im_end>"

    def validate_inputs(self, images=None, text=None, **kwargs):
        super().validate_inputs(images=images, text=text, **kwargs)
        if any(one.count("<image>") != one.count("<im_start><image><im_end>") for one in text):
            raise ValueError("placeholders must be formatted as <im_start><image><im_end>")


def test_what_has_to_stand_around_a_placeholder_is_no_part_of_its_run(tiny_base, clip_tower):
    vlm = compose_tiny(tiny_base("vicuna"), clip_tower, "v1", use_im_start_end=True)
    own, fields = vlm.processor, ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
    given = {name: getattr(own, name) for name in fields}
    reader = MediaReader(WrappedProcessor(own.image_processor, own.tokenizer, **given))
    assert reader.read([[picture((40, 64))] * 2]).runs == vlm.reader.read([[picture((40, 64))] * 2]).runs
    bare = WrappedProcessor(own.image_processor, own.tokenizer, **given)
    bare.image_end_token = "no token"
    with pytest.raises(BadFileError, match="placeholders must be formatted as <im_start><image><im_end>"):
        MediaReader(bare)
