# SPDX-License-Identifier: Apache-2.0
"""Samples of released models share a row exactly, or are found not to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moellava.data.collate import MediaCollator
from moellava.data.packing import joined
from moellava.data.places import Places
from moellava.train.loss import SupervisedHead, supervised_positions
from moellava.train.own_positions import share_rows
from moellava.train.packing import difference
from moellava.train.sample_attention import SampleAttention
from tests import tiny
from tests.data.test_collate import Paints, sample
from tests.lmm.tiny import TINY
from tests.model.tiny_language_models import tiny_language_model
from tests.older import IS_OLD

EXACT = {
    **dict.fromkeys(("internvl", "llava-1.5", "llava-1.6", "llava-interleave", "llava-next-video"), True),
    **dict.fromkeys(("llava-onevision", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "smolvlm"), True),
    **dict.fromkeys(("gemma3", "llama-3.2-vision", "paligemma", "phi3-v", "qwen-vl"), False),
}
"""Released architecture -> whether its samples can share a row."""

BY_MASKS = ("gemma3",) if IS_OLD else ()
"""Those whose samples can where masks tell them apart, and only then."""

QUICK = ("llava-onevision", "gemma3", "qwen2.5-vl")

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


@pytest.mark.slow
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
        assert (why is None) == (EXACT[family_id] or (not is_on and family_id in BY_MASKS)), why


SIZES = {"low": (112, 84), "flat": (200, 56), "small": (28, 28)}


@pytest.fixture
def wide_pictures(tmp_path) -> Path:
    """A folder of pictures of different sizes, which take several tokens a row and several rows."""
    folder, draw = tmp_path / "wide", np.random.default_rng(0)
    folder.mkdir()
    for name, (width, height) in SIZES.items():
        Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


def learnt(trainer: SimpleNamespace, batch: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The summed loss of a batch, and all gradients."""
    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    places = Places(**batch["places"])
    supervised = supervised_positions(inputs.pop("labels"), places.supervised)
    with trainer.attention:
        if places.is_packed:
            share_rows(trainer.model, inputs, places.lengths)
            trainer.attention.tell(places.lengths)
        logits = trainer.model(**inputs, use_cache=False).logits.flatten(0, 1)[supervised.place_N]
        loss = torch.nn.functional.cross_entropy(logits, supervised.target_N, reduction="sum")
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        return loss.detach(), [g for g in torch.autograd.grad(loss, trained, allow_unused=True) if g is not None]


VIDEOS = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "llava-onevision", "llava-next-video")


@pytest.mark.parametrize("family_id", [case for case in CASES if EXACT[case.values[0]]])
def test_pictures_of_any_size_several_of_them_and_videos_train_as_in_rows_of_their_own(
    family_id, samples_of, opened, wide_pictures, clips
):
    """Losses and gradients, in one row and in two, with the text alone of one sample among them."""
    records = [
        tiny.record("a", "<image>\nWhat is it?", "A fractal.", image="low.png"),
        tiny.record("b", "Is it red or blue?", "It is green."),
        tiny.record("c", "Now <image> and <image>?", "Others.", image=["flat.png", "low.png"]),
        tiny.record("d", "<image>\nAnd here?", "Another one.", image="small.png"),
    ]
    if family_id in VIDEOS:
        records.append(tiny.record("e", "<video>\nWhat moves?", "A ball.", video="shapes.mp4"))
    data = {"image_folder": wide_pictures, "video_folder": clips, "num_frames": 4}
    dataset, vlm = samples_of(family_id, records, **data), opened(family_id)
    collator = vlm.collator()
    collator.is_told = True
    samples = [dataset[number] for number in range(len(records))]
    for is_on in (False, True):
        trainer = stand_in(collator, vlm.model.eval(), is_on)
        assert difference(trainer, samples) is None
        wanted, gradients = learnt(trainer, collator(samples))
        for rows in ([joined(samples)], [joined(samples[:2]), joined(samples[2:])]):
            found, others = learnt(trainer, collator(rows))
            assert float(found) == pytest.approx(float(wanted), rel=1e-5)
            for mine, theirs in zip(others, gradients, strict=True):
                assert float((mine - theirs).norm()) <= 1e-5 * max(float(theirs.norm()), 1e-3)


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
