# SPDX-License-Identifier: Apache-2.0
"""Which released models' pixels can be kept (`--cache_pixels`): found out by trying, and named where not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moellava.data.known import KnownReader
from moellava.errors import UserError
from moellava.lmm.architecture import ARCHITECTURES
from moellava.train.known_pictures import know
from moellava.train.known_pixels import KeptPixels, refuse_pixels, shows_the_same
from moellava.vlm import collator_of
from tests.lmm import conftest, test_videos
from tests.lmm.tiny import WITH_VIDEO
from tests.processes import losses_of

JOINED = {"llama-3.2-vision", "smolvlm", "qwen-vl"}
"""Architectures whose processor makes one tensor of the pictures of a sample, or opens the files itself."""

KEPT = sorted(ARCHITECTURES.keys() - JOINED)


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


def test_training_goes_on_as_without_it(run, tmp_path):
    plain = run("qwen2.5-vl", "plain")
    kept = run("qwen2.5-vl", "kept", cache_pixels=tmp_path / "pixels", train_vision_encoder=True)
    again = run("qwen2.5-vl", "again", train_vision_encoder=True)
    assert losses_of(kept) == losses_of(again) != losses_of(plain)
