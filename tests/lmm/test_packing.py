# SPDX-License-Identifier: Apache-2.0
"""Samples of released models share a row exactly, or are found not to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moellava.train.loss import SupervisedHead
from moellava.train.packing import difference
from tests import tiny
from tests.lmm.tiny import TINY

EXACT = {
    **dict.fromkeys(("internvl", "llava-1.5", "llava-1.6", "llava-interleave", "llava-next-video"), True),
    **dict.fromkeys(("llava-onevision", "qwen3-vl", "smolvlm"), True),  # of Qwen3-VL images of one token alone
    **dict.fromkeys(("gemma3", "llama-3.2-vision", "paligemma", "phi3-v", "qwen-vl", "qwen2-vl", "qwen2.5-vl"), False),
}
"""Released architecture -> whether its samples can share a row."""

QUICK = ("llava-onevision", "gemma3")

CASES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in sorted(TINY)]


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
    trainer = SimpleNamespace(
        data_collator=collator,
        model=vlm.model,
        model_wrapped=vlm.model,
        head=SupervisedHead(vlm.model.get_output_embeddings(), 400),
        tell_routers=lambda inputs, places: None,
        _prepare_inputs=lambda batch: batch,
    )
    why = difference(trainer, [dataset[number] for number in range(3)])
    assert (why is None) == EXACT[family_id], why
