# SPDX-License-Identifier: Apache-2.0
"""Samples of released models share a row exactly, or are found not to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moellava.data.collate import MediaCollator
from moellava.train.loss import SupervisedHead
from moellava.train.packing import difference
from moellava.train.sample_attention import SampleAttention
from tests import tiny
from tests.data.test_collate import Paints, sample
from tests.lmm.tiny import TINY
from tests.model.tiny_language_models import tiny_language_model
from tests.older import IS_OLD

EXACT = {
    **dict.fromkeys(("internvl", "llava-1.5", "llava-1.6", "llava-interleave", "llava-next-video"), True),
    **dict.fromkeys(("llava-onevision", "qwen3-vl", "smolvlm"), True),  # of Qwen3-VL images of one token alone
    **dict.fromkeys(("gemma3", "llama-3.2-vision", "paligemma", "phi3-v", "qwen-vl", "qwen2-vl", "qwen2.5-vl"), False),
}
"""Released architecture -> whether its samples can share a row."""

BY_ITSELF = ("qwen2-vl", "qwen2.5-vl")
"""Those whose samples can where attention runs over each by itself: their positions count on from sample to sample, and
only differences within one matter; masks tell samples apart by positions."""

BY_MASKS = ("gemma3",) if IS_OLD else ()
"""Those whose samples can where masks tell them apart, and only then."""

QUICK = ("llava-onevision", "gemma3")

CASES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in sorted(TINY)]


def stand_in(collator: MediaCollator, model: Any, is_on: bool = False) -> SimpleNamespace:
    """What of a trainer is asked.

    Args:
        is_on: whether attention runs over each sample of a row by itself.
    """
    attention = SampleAttention(model)
    attention.is_on = is_on
    head = SupervisedHead(model.get_output_embeddings(), 400)
    tells = {"tell_routers": lambda inputs, places: None, "_prepare_inputs": lambda batch: batch}
    told = {"data_collator": collator, "head": head, "attention": attention}
    return SimpleNamespace(model=model, model_wrapped=model, **told, **tells)


@pytest.mark.parametrize("family_id", CASES)
def test_released_models_are_exact_or_refused(family_id, samples_of, opened, pictures):
    records = [
        tiny.record("a", "<image>\nWhat is it?", "A fractal.", image="0.png"),
        tiny.record("b", "Is it red or blue?", "It is green."),
        tiny.record("c", "<image>\nAnd here?", "Another one.", image="1.png"),
    ]
    dataset, vlm = samples_of(family_id, records), opened(family_id)
    collator = vlm.collator()
    collator.is_told = True
    samples = [dataset[number] for number in range(3)]
    for is_on in (False, True):
        trainer = stand_in(collator, vlm.model, is_on)
        why = difference(trainer, samples)
        assert (why is None) == (EXACT[family_id] or family_id in (BY_ITSELF if is_on else BY_MASKS)), why


LANGUAGE_MODELS = {
    **dict.fromkeys(("gemma2", "qwen3_moe", "lfm2", "gpt2"), None),
    **dict.fromkeys(("falcon_h1", "qwen3_next", "mamba2", "bloom"), "of their norm off"),
}
"""Language model -> what is found wrong with packing it: states that run on, and biases by the distance from a row's
first token."""


HALVED = ("qwen3_moe", "qwen3_next")
"""Those that are tried in half precision as well."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"), [(n, torch.float32) for n in LANGUAGE_MODELS] + [(n, torch.bfloat16) for n in HALVED]
)
def test_states_that_run_on_are_found(name, dtype):
    torch.manual_seed(0)
    model = tiny_language_model(name).eval().to(dtype)
    collator = MediaCollator(Paints(), 0)
    collator._blanks = lambda shown: []
    collator.is_told = True
    generator = torch.Generator().manual_seed(0)
    samples = [sample(torch.randint(5, 60, (n,), generator=generator).tolist(), n // 2) for n in (9, 14, 11)]
    for is_on in (False, True):
        trainer = stand_in(collator, model, is_on)
        why = difference(trainer, samples)
        assert (why is None) == (LANGUAGE_MODELS[name] is None), why
        assert why is None or dtype is torch.bfloat16 or LANGUAGE_MODELS[name] in why
