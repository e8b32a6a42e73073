# SPDX-License-Identifier: Apache-2.0
"""Which released models' pixels can be kept (`--cache_pixels`): found out by trying, and named where not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moellava.data.known import KnownReader, alike
from moellava.data.media_reader import MediaReader, Shown
from moellava.errors import UserError
from moellava.lmm.architecture import ARCHITECTURES
from moellava.model.probes import FAILURES
from moellava.train.known_pictures import know
from moellava.train.known_pixels import KeptPixels, refuse_pixels, shows_the_same, tried
from moellava.vlm import collator_of
from tests.lmm import conftest, test_videos
from tests.lmm.tiny import WITH_VIDEO
from tests.lmm.tiny_released_models import released_models, tiny_processor, write_tokenizer
from tests.processes import losses_of

BY_PATHS = {"qwen-vl"}
"""Architectures that open the files themselves."""

IN_ROWS = {"llama-3.2-vision", "smolvlm"}
"""Architectures whose processor puts the pictures of a sample into one row of a tensor."""

KEPT = sorted(ARCHITECTURES.keys() - BY_PATHS)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_pixels_are_kept_or_refused_by_name(name, small_opened, tmp_path):
    vlm = small_opened(name)
    assert shows_the_same(vlm.encoder.reader) == (name in KEPT)
    if name not in KEPT:
        with pytest.raises(UserError, match=r"--cache_pixels .* depends on those beside it"):
            refuse_pixels(vlm, str(tmp_path), None)


@pytest.mark.parametrize("name", KEPT)
def test_a_batch_is_the_same_to_the_bit(name, small_opened, samples_of, clips, tmp_path):
    """Of one image, two, a video, a video beside an image, and text; a video may be its frames."""
    vlm, options = small_opened(name), {"video_folder": clips, "num_frames": test_videos.FRAMES}
    dataset = samples_of(name, [*conftest.RECORDS, *test_videos.RECORDS], vlm=vlm, **options)
    collator = collator_of(vlm.encoder, ARCHITECTURES[name])
    batches = [[0, 1, 2], [3, 4], [1, 3, 5], [6]]
    before = [collator([dataset[number] for number in batch]) for batch in batches]
    args = SimpleNamespace(per_device_train_batch_size=2, dataloader_num_workers=0)
    process = SimpleNamespace(wait_for_everyone=lambda: None)
    trainer: Any = SimpleNamespace(vlm=vlm, args=args, data_collator=collator, accelerator=process)
    know(trainer, tmp_path / "pixels", [dataset], KeptPixels(vlm.encoder.reader))
    assert isinstance(collator.reader, KnownReader)
    for batch, wanted in zip(batches, before, strict=True):
        found = collator([dataset[number] for number in batch])
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(value)), f"{batch} {key}"


SIZES = [(28, 28), (300, 40), (57, 91), (40, 300), (200, 210), (14, 60)]


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("counts", [(3, 1, 2), (2, 4), (1, 1, 1, 1), (6,)], ids=str)
def test_pictures_of_all_shapes_are_the_same_in_any_company(name, counts, small_opened):
    """Of six shapes, so many in each sample; what a sample lacks beside another is filled up as its processor does."""
    draw, shapes = np.random.default_rng(0), iter(SIZES)
    pictures = [Image.fromarray(draw.integers(0, 256, (*next(shapes)[::-1], 3), np.uint8)) for _ in range(sum(counts))]
    rest = iter(pictures)
    batch: list[list[Shown]] = [[next(rest) for _ in range(count)] for count in counts]
    ((found, wanted),) = tried(small_opened(name).encoder.reader, [batch])
    assert found.runs == wanted.runs and found.tensors.keys() == wanted.tensors.keys()
    for key, value in wanted.tensors.items():
        assert torch.equal(found.tensors[key], value) and found.tensors[key].dtype == value.dtype, key


UNREGISTERED = {"deepseek_ocr2": False, "granite_docling": True, "idefics2": False, "idefics3": True}
"""Some classes without an entry -> whether their pixels are kept. DeepSeek-OCR 2 has a further input of the tiles of
large pictures; Idefics 2 fills up pictures to the largest of a batch."""


@pytest.mark.parametrize(
    "model_type",
    [name if name in UNREGISTERED else pytest.param(name, marks=pytest.mark.slow) for name in released_models()],
)
def test_any_class_shows_the_same_or_is_refused(model_type, tmp_path):
    """Small pictures and large ones."""
    write_tokenizer(tmp_path)
    try:
        reader = MediaReader(tiny_processor(model_type, tmp_path))
    except (*FAILURES, UserError) as error:
        pytest.skip(f"no processor of it can be made: {error}")
    is_kept = shows_the_same(reader)
    assert UNREGISTERED.get(model_type, is_kept) == is_kept
    if is_kept:
        draw = np.random.default_rng(0)
        sizes = [(28, 28), (300, 40), (1000, 700), (40, 300), (14, 60)]
        large = [Image.fromarray(draw.integers(0, 256, (high, wide, 3), np.uint8)) for wide, high in sizes]
        batches: list[list[list[Shown]]] = [[large[:1], large[1:3], large[3:]], [large[2:3], large[:1]]]
        assert all(alike(found, wanted) for found, wanted in tried(reader, batches))


@pytest.mark.parametrize("name", sorted(IN_ROWS))
def test_what_is_known_of_a_size_is_small(name, small_opened):
    """A mask of a picture's pixels, all ones, is one number for each size."""
    known = KnownReader(small_opened(name).encoder.reader, None, None)
    assert known.rows is not None
    known._in_parts((56, 56), (72, 40))
    found = [one for media in known._of_two.values.values() for one in media.tensors.values()]
    assert found and all(one.untyped_storage().nbytes() < 100 for one in found)


@pytest.mark.parametrize("name", sorted(set(KEPT) & set(WITH_VIDEO)))
def test_what_is_known_of_a_size_is_put_together(name, small_opened, monkeypatch):
    """Not every combination of sizes is asked for, where pictures do not depend on each other."""
    reader = small_opened(name).encoder.reader
    known = KnownReader(reader, None, None)
    assert known.is_divisible == (name != "llava-onevision"), "which counts the images of a sample"
    if known.is_divisible:
        known._in_parts((56, 56), (72, 40))
        monkeypatch.setattr(reader, "read", lambda *_: pytest.fail("asked again"))
        assert len(known._in_parts((72, 40), (56, 56), (72, 40)).runs[0]) == 3


@pytest.mark.parametrize("name", ["qwen2.5-vl", *sorted(IN_ROWS)])
def test_training_goes_on_as_without_it(name, run, tmp_path):
    plain = run(name, "plain")
    kept = run(name, "kept", cache_pixels=tmp_path / "pixels", train_vision_encoder=True)
    again = run(name, "again", train_vision_encoder=True)
    assert losses_of(kept) == losses_of(again) != losses_of(plain)
