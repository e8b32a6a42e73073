# SPDX-License-Identifier: Apache-2.0
"""Images in their own shape, for a Pixtral tower in Hugging Face's LLaVA: as its class reads them by `image_sizes`."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, PixtralVisionModel
from transformers.utils.import_utils import is_torchvision_available

from moellava.errors import UserError
from moellava.model.shaped import PixtralProcessor
from moellava.model.tower_probes import reads_shapes
from moellava.serve.answer import Request, answer
from tests import tiny
from tests.model.any_tower import write_tower
from tests.model.tiny_towers import tiny_config
from tests.processes import train_here

SHAPES = ((56, 56), (100, 40), (30, 90), (20, 20))
PICTURES = [Image.effect_mandelbrot(shape, (-3, -2.5, 2, 2.5), 20).convert("RGB") for shape in SHAPES]
PATCHES = [16, 8, 8, 4]
"""Of each, with a longer edge of at most 56 pixels, in patches of 14."""

NATIVE = {"image_aspect_ratio": "native", "image_projector_type": "mlp2x_gelu"}


@pytest.fixture(scope="module")
def pixtral(tmp_path_factory):
    """A Pixtral tower of images of at most 56 pixels."""
    return write_tower(tmp_path_factory.mktemp("pixtral") / "tower", "pixtral", image_size=56)


@pytest.fixture(scope="module")
def shaped(tiny_base, pixtral):
    return tiny.compose_tiny(tiny_base("vicuna"), pixtral, "v1", **NATIVE)


def test_plain_transformers_computes_the_same_of_the_same_input(shaped, pixtral, tmp_path):
    shaped.save(tmp_path / "folder")
    plain, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not any(info.values())
    again = tiny.reopen(tmp_path / "folder")
    processor = AutoProcessor.from_pretrained(tmp_path / "folder") if is_torchvision_available() else again.processor
    assert type(processor).__name__ == PixtralProcessor.__name__
    prompts, options = ["USER: <image>\nwhat? ASSISTANT:"] * len(PICTURES), {"padding": True, "padding_side": "left"}
    batch = processor(images=PICTURES, text=prompts, return_tensors="pt", **options)
    reader = again.encoder.reader
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == PATCHES
    assert [reader.run_length(picture.size, 1) for picture in PICTURES] == PATCHES
    with torch.no_grad():
        wanted, found = plain.eval()(**batch).logits, again.model(**batch).logits
        features = again.model.model.get_image_features(
            batch["pixel_values"], image_sizes=batch["image_sizes"], return_dict=True
        ).pooler_output
        tower, width = PixtralVisionModel.from_pretrained(pixtral).eval(), batch["pixel_values"]
        for number, (high, wide) in enumerate(batch["image_sizes"].tolist()):
            alone = tower(width[number : number + 1, :, :high, :wide], output_hidden_states=True).hidden_states[-1]
            own = again.model.model.multi_modal_projector(alone)[0]
            torch.testing.assert_close(features[number], own, atol=1e-5, rtol=0)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_a_batch_answers_as_single_requests_do(shaped):
    requests = [Request("what?", [picture]) for picture in PICTURES]
    requests += [Request("compare", PICTURES[:2]), Request("no picture")]
    alone = [answer(shaped, [request], max_new_tokens=6)[0] for request in requests]
    assert answer(shaped, requests, max_new_tokens=6) == alone and not any(one.error for one in alone)


@pytest.mark.slow
def test_the_stages_train_on_images_in_their_own_shape(flags_for, pixtral, tmp_path):
    own = {"max_steps": 2, "save_strategy": "no", "image_aspect_ratio": "native"}
    for stage in ("pretrain", "finetune", "moe"):
        flags = flags_for(tmp_path, stage) | own
        train_here(flags | ({"image_tower": pixtral} if "image_tower" in flags else {}))
    vlm = tiny.reopen(tmp_path / "moe")
    assert vlm.section.image_aspect_ratio == "native" and vlm.spec is not None
    assert [vlm.encoder.reader.run_length(picture.size, 1) for picture in PICTURES] == PATCHES


def test_a_folder_may_be_shown_squares_later(tiny_base, pixtral):
    vlm = tiny.compose_tiny(tiny_base("vicuna"), pixtral, "v1", **NATIVE)
    vlm.settle("v1", "square")
    assert {vlm.encoder.reader.run_length(picture.size, 1) for picture in PICTURES} == {16}
    vlm.settle("v1", "native")
    assert [vlm.encoder.reader.run_length(picture.size, 1) for picture in PICTURES] == PATCHES


@pytest.mark.parametrize(
    ("tower", "options", "words"),
    [
        ("clip", {}, "needs one tower, which reads images of any shape .* This is a clip_vision_model tower"),
        ("pixtral", {"image_projector_type": "pool_mlp2x_gelu"}, "a projector that gives a token for every patch"),
    ],
)
def test_what_cannot_keep_shapes_is_named(tower, options, words, tiny_base, clip_tower, pixtral):
    with pytest.raises(UserError, match=words):
        tiny.compose_tiny(tiny_base("vicuna"), clip_tower if tower == "clip" else pixtral, "v1", **NATIVE | options)


def test_a_tower_of_any_shape_is_found_by_trying():
    assert reads_shapes(tiny_config("pixtral")) and not reads_shapes(tiny_config("siglip_vision_model"))


def test_rows_end_with_the_tokens_that_a_folder_names(shaped):
    """As in published Pixtral folders."""
    processor = PixtralProcessor(
        shaped.processor.image_processor,
        shaped.tokenizer,
        14,
        image_token="i",
        image_break_token="b",
        image_end_token="e",
    )
    assert processor.replace_image_token({"image_sizes": torch.tensor([[28, 42]])}, 0) == "iiibiiie"
