# SPDX-License-Identifier: Apache-2.0
"""Features of pictures are computed once, for every class that takes them, and change no answer."""

from __future__ import annotations

import functools

import pytest
import torch

from moellava.data.video import read_video
from moellava.model.features import FeatureCache, encoder_of
from moellava.serve.answer import Prompts
from moellava.serve.prompt import Request
from tests.lmm.tiny import NATIVE, WITH_VIDEO
from tests.older import marked

QUESTION = "What colour is it?"
TAKES_NONE = {"llama-3.2-vision"}
"""Its decoder attends to pictures across, and no class of its takes features."""


def counted(vlm, monkeypatch, modality="image"):
    """How many pictures, tiles or patches a model's encoder is given from now on, call by call."""
    encode, calls = getattr(vlm.model.base_model, f"get_{modality}_features"), []

    @functools.wraps(encode)
    def counting(**given):
        calls.append(next(len(value) for name, value in given.items() if name.startswith("pixel_values")))
        return encode(**given)

    monkeypatch.setattr(vlm.model.base_model, f"get_{modality}_features", counting)
    return calls


def logits_of(vlm, inputs, **options):
    """Those of the first two tokens of each answer."""
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False} | options
    return torch.stack(vlm.model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True).logits)


def batch_of(vlm, *requests):
    prompts = Prompts(vlm)
    return prompts.batch([prompts.example(request) for request in requests])


@pytest.mark.parametrize("family_id", marked(NATIVE))
def test_each_picture_is_encoded_once_and_what_is_read_stays(family_id, small_opened, pictures, monkeypatch):
    vlm, cache, (one, two, _) = small_opened(family_id), FeatureCache(), pictures
    first, second, both = Request(QUESTION, [one]), Request(QUESTION, [two]), Request("Two", [one, two])
    batches = [[first], [second, first], [Request("Hi"), first, Request("And now?", [two]), first], [both]]
    inputs = [batch_of(vlm, *requests) for requests in batches]
    wanted = [logits_of(vlm, given) for given in inputs]
    if encoder_of(vlm.model, "image") is None:
        assert family_id in TAKES_NONE and cache.encoded(vlm.model, inputs[0], inputs[0]) == inputs[0]
        return
    calls = counted(vlm, monkeypatch)
    for number in (0, 1, 2, 3, 3, 0):
        kept = cache.encoded(vlm.model, inputs[number], inputs[number])
        torch.testing.assert_close(logits_of(vlm, kept), wanted[number], atol=1e-5, rtol=1e-5)
    in_batches_of_texts = {"llava-onevision": 1, "smolvlm": 1}  # where what stands in one text is read together
    assert len(calls) == 2 + in_batches_of_texts.get(family_id, 0) and not cache.joint
    logits = logits_of(vlm, inputs[2], num_beams=2)
    torch.testing.assert_close(
        logits_of(vlm, cache.encoded(vlm.model, inputs[2], inputs[2]), num_beams=2), logits, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("family_id", WITH_VIDEO)
def test_so_is_each_video(family_id, small_opened, clips, monkeypatch):
    vlm, cache = small_opened(family_id), FeatureCache()
    if encoder_of(vlm.model, "video") is None:
        assert family_id in ("internvl", "smolvlm"), "whose frames are images"
        return
    shown = [read_video(clips / name, 3) for name in ("shapes.mp4", "wide.mp4")]
    requests = [Request("What moves?", videos=[clip]) for clip in shown]
    inputs = [batch_of(vlm, requests[0]), batch_of(vlm, *requests), batch_of(vlm, requests[1], requests[1])]
    wanted = [logits_of(vlm, given) for given in inputs]
    calls = counted(vlm, monkeypatch, "video")
    for given, logits in zip(inputs, wanted, strict=True):
        kept = cache.encoded(vlm.model, given, given)
        torch.testing.assert_close(logits_of(vlm, kept), logits, atol=1e-5, rtol=1e-5)
    assert len(calls) == 2 and not cache.joint
