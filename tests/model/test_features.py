# SPDX-License-Identifier: Apache-2.0
"""What is shown is encoded once, whoever asks and however often, and never after it has become something else."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from PIL import Image

from moellava.model.features import FeatureCache, cut, features_of, key_of
from moellava.serve.answer import Prompts, answer, stream
from moellava.serve.generate import Sampling
from moellava.serve.prompt import Request
from tests import tiny

QUESTIONS = ["what colour is it?", "and what is it?", "is it large?", "why?", "hm?", "is it a circle?", "red?", "no?"]


@pytest.fixture
def vlm(composed):
    """A model of its own."""
    return dataclasses.replace(composed, model=copy.deepcopy(composed.model))


@pytest.fixture
def seen(vlm):
    """How many pictures the tower was given, call by call."""
    calls: list[int] = []
    vlm.model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    return calls


def anew(vlm, requests):
    """What the same model answers that has kept nothing."""
    return answer(dataclasses.replace(vlm), requests, max_new_tokens=6)


def test_a_picture_asked_eight_times_is_encoded_once(vlm, seen, pictures):
    requests = [Request(question, [pictures[0]]) for question in QUESTIONS]
    wanted = [answer(dataclasses.replace(vlm), [request], max_new_tokens=6)[0] for request in requests]
    assert seen == [1] * 8 and len(set(wanted)) > 1
    seen.clear()
    assert answer(vlm, requests, max_new_tokens=6) == wanted and seen == [1], "eight in a batch"
    assert [answer(vlm, [request], max_new_tokens=6)[0] for request in requests] == wanted and seen == [1]
    assert "".join(stream(vlm, requests[0], Sampling(max_new_tokens=6))) == wanted[0] and seen == [1]
    assert answer(vlm, [Request("both", pictures[:2])], max_new_tokens=6) == anew(vlm, [Request("both", pictures[:2])])
    assert seen[1:] == [1, 2], "the other one alone; and both, without what is kept"


def test_pictures_are_told_apart_by_what_they_show(vlm, seen, pictures, tmp_path):
    path = tmp_path / "it.png"
    said = []
    for picture in (pictures[0], pictures[1]):
        Image.open(picture).save(path)
        said += answer(vlm, [Request(QUESTIONS[0], [path])], max_new_tokens=6)
    answer(vlm, [Request(QUESTIONS[1], [Image.open(pictures[0])])], max_new_tokens=6)
    assert seen == [1, 1] and said == [anew(vlm, [Request(QUESTIONS[0], [one])])[0] for one in pictures[:2]]


@pytest.mark.parametrize("change", ["in place", "behind autograd's back", "another tensor"])
def test_other_weights_have_other_features(vlm, seen, pictures, change):
    requests = [Request(QUESTIONS[0], [pictures[0]])]
    answer(vlm, requests, max_new_tokens=6)
    weight = vlm.model.model.multi_modal_projector.linear_1.weight
    with torch.no_grad():
        if change == "in place":
            weight.neg_()
        elif change == "another tensor":
            vlm.model.model.multi_modal_projector.linear_1.weight = torch.nn.Parameter(-weight)
        else:
            weight.data *= -1
    seen.clear()
    assert answer(vlm, requests, max_new_tokens=6) == anew(vlm, requests) and seen == [1, 1]


def test_it_keeps_so_many_bytes_and_lets_the_oldest_go(vlm, pictures):
    prompts = Prompts(vlm)
    batches = [prompts.batch([prompts.example(Request("it", [one]))]) for one in pictures]
    calls = []
    vlm.model.model.vision_tower.register_forward_pre_hook(lambda *_: calls.append(1))
    one = FeatureCache()
    one.encoded(vlm.model, batches[0], batches[0])
    small = FeatureCache(limit=2 * one.bytes)
    for number, new in ((0, 1), (1, 1), (0, 0), (2, 1), (0, 0), (1, 1), (2, 1)):
        calls.clear()
        small.encoded(vlm.model, batches[number], batches[number])
        assert (len(calls), small.bytes <= small.limit) == (new, True)
    assert small.bytes == sum(features.bytes for features in small.kept.values()) == small.limit
    none = FeatureCache(limit=one.bytes - 1)
    none.encoded(vlm.model, batches[0], batches[0])
    assert (none.bytes, len(none.kept)) == (0, 0)
    assert len(copy.deepcopy(one).kept) == 0 and len(one.kept) == 1


def test_tiles_that_fill_up_a_batch_are_no_part_of_a_picture(tiny_base, clip_tower):
    vlm = tiny.compose_tiny(tiny_base("vicuna"), clip_tower, "v1", image_aspect_ratio="anyres")
    small, wide = (Request("it", [Image.effect_mandelbrot(size, (-2, -1, 1, 1), 9)]) for size in ((20, 20), (90, 20)))
    prompts, cache = Prompts(vlm), FeatureCache()
    alone, padded = (prompts.batch([prompts.example(one) for one in row]) for row in ([small], [small, wide]))
    assert alone["pixel_values"].shape[1] < padded["pixel_values"].shape[1]
    calls = []
    vlm.model.model.vision_tower.register_forward_pre_hook(lambda *_: calls.append(1))
    kept = [cache.encoded(vlm.model, given, given) for given in (alone, padded, padded, alone)]
    assert len(calls) == 2 and len(cache.kept) == 2
    for given, features in zip((alone, padded, padded, alone), kept, strict=True):
        wanted = vlm.model.model.get_image_features(given["pixel_values"], given["image_sizes"]).pooler_output
        for one, other in zip(features["mm_encoder_outputs"]["image"].pooler_output, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_what_cannot_be_told_apart_is_kept_as_a_whole():
    pixels = torch.arange(1.0, 25).view(4, 1, 2, 3)
    assert [len(one["pixel_values"]) for one in cut({"pixel_values": pixels}, "pixel_values")] == [1] * 4
    grid = torch.tensor([[1, 1, 3], [1, 1, 1]])
    parts = cut({"pixel_values": pixels, "image_grid_thw": grid}, "pixel_values")
    assert [len(one["pixel_values"]) for one in parts] == [3, 1]
    assert cut({"pixel_values": pixels, "image_grid_thw": grid[:1]}, "pixel_values") is None
    assert cut({"pixel_values": pixels, "batch_num_images": torch.tensor([1, 3])}, "pixel_values") is None
    assert cut({"pixel_values": pixels, "something_else": pixels}, "pixel_values") is None
    assert cut({"pixel_values": pixels * torch.tensor([1, 1, 1, 0]).view(4, 1, 1, 1)}, "pixel_values") is None
    assert features_of(object()) is None
    keys = {key_of({"pixel_values": one}) for one in (pixels, pixels.view(2, 2, 2, 3), pixels.double(), pixels + 1)}
    assert len(keys) == 4 and key_of({"pixel_values": pixels}) in keys
