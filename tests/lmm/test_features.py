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

QUESTION = "<image>\nWhat colour is it?"
NOT_KEPT = {"llama-3.2-vision"}
"""Its pictures are read by attention across, and its class takes no features."""


def counted(vlm, monkeypatch, modality="image"):
    """The pictures, tiles or patches that a model's encoder is given from now on, call by call."""
    calls = []
    encode = getattr(vlm.model.base_model, f"get_{modality}_features")

    @functools.wraps(encode)
    def counting(**given):
        calls.append(next(len(value) for name, value in given.items() if name.startswith("pixel_values")))
        return encode(**given)

    monkeypatch.setattr(vlm.model.base_model, f"get_{modality}_features", counting)
    return calls


def said(vlm, inputs, **options):
    """Logits of the first two tokens of each answer."""
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, **options}
    given = vlm.model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return torch.stack(given.logits)


@pytest.mark.parametrize("family_id", NATIVE)
def test_a_picture_is_encoded_once_and_answers_stay(family_id, opened, pictures, monkeypatch):
    vlm, cache = opened(family_id), FeatureCache()
    prompts, (one, two, _) = Prompts(vlm), pictures
    rounds = [[[one]], [[two], [one]], [[one], [one], [two]], [[one, two]], [[], [two]]]
    batches = [prompts.batch([prompts.example(Request(QUESTION if row else "hi", row[:1])) for row in shown] if max(map(len, shown)) < 2 else [prompts.example(Request("two", row)) for row in shown]) for shown in rounds]
    wanted = [said(vlm, inputs) for inputs in batches]
    if encoder_of(vlm.model, "image") is None:
        assert family_id in NOT_KEPT
        return
    calls = counted(vlm, monkeypatch)
    for again in range(2):
        for shown, inputs, logits in zip(rounds, batches, wanted, strict=True):
            found = said(vlm, cache.encoded(vlm.model, inputs, inputs))
            torch.testing.assert_close(found, logits, atol=2e-5, rtol=1e-5)
        print(family_id, again, calls, cache.joint, cache.bytes, len(cache.kept))
        calls.clear()
