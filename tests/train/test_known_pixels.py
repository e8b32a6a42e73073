# SPDX-License-Identifier: Apache-2.0
"""Each picture is decoded once; training goes on as without `--cache_pixels`, to the bit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moellava.data import media
from moellava.errors import UserError
from moellava.train.arguments import parse_arguments
from moellava.train.known_pixels import KeptPixels, refuse_pixels
from tests.processes import Flags, losses_of, train_here, words_of
from tests.train.test_known_features import SHORT, in_full, of_samples, shown

__all__ = ["shown"]


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The images that a run opens in full."""
    paths: list[str] = []
    opened = media.open_image
    monkeypatch.setattr(media, "open_image", lambda path, *rest: paths.append(str(path)) or opened(path, *rest))
    return paths


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_a_tower_trains_as_without_it_and_a_later_run_decodes_nothing(flags_for, decoded, tmp_path, caplog):
    flags = flags_for(tmp_path, "finetune") | SHORT | {"train_vision_encoder": True, "untrained_projector": True}
    del flags["pretrain_mm_mlp_adapter"]
    plain = train_here(flags | {"output_dir": tmp_path / "plain"})
    kept = flags | {"cache_pixels": tmp_path / "pixels"}
    decoded.clear()
    first = train_here(kept)
    assert len(decoded) == 3, "three pictures of 24 records"
    assert "Pixels: 3 pictures, 0 of them known before, 3 computed" in caplog.text
    decoded.clear()
    again = train_here(kept | {"output_dir": tmp_path / "again", "dataloader_num_workers": 1})
    assert decoded == []
    assert losses_of(plain) == losses_of(first) == losses_of(again)
    files = [weights(folder) for folder in (plain, first, again)]
    for name, value in files[0].items():
        assert torch.equal(value, files[1][name]) and torch.equal(value, files[2][name]), name


@pytest.mark.parametrize("ratio", ["square", "pad", "anyres", pytest.param("anyres_max_9", marks=pytest.mark.slow)])
def test_a_batch_is_the_same_to_the_bit(ratio, parts, shown, tmp_path):
    flags = in_full(parts, shown, tmp_path) | {"image_aspect_ratio": ratio, "train_vision_encoder": True}
    del flags["cache_features"]
    before, after, trainer = of_samples(flags | {"cache_pixels": tmp_path / "pixels"})
    assert before.keys() == after.keys() and any(name.startswith("pixel_values") for name in before)
    for name in before.keys() - {"places", "records"}:
        assert torch.equal(before[name], after[name]), name
    assert KeptPixels(trainer.vlm.encoder.reader).tones is not None


def test_pictures_are_a_quarter_of_their_pixels_on_disk(flags_for, tmp_path, composed):
    train_here(flags_for(tmp_path, "pretrain") | SHORT | {"cache_pixels": tmp_path / "pixels"})
    (file,) = (tmp_path / "pixels").glob("*/*.safetensors")
    content, side = load_file(file)["features"], composed.model.config.vision_config.image_size
    assert content.dtype == torch.uint8 and content.shape == (1 + 3, 3 * side, side), "a blank, and three pictures"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"is_multimodal": False}, "--cache_pixels .* and --is_multimodal False conflict"),
        ({"cache_features": "features"}, "--cache_pixels .* does nothing beside --cache_features features"),
    ],
    ids=str,
)
def test_flags_that_contradict_it(flags, words, parts, tmp_path):
    common: Flags = {"model_name_or_path": parts / "lm", "data_path": parts / "sft.json", "output_dir": tmp_path}
    with pytest.raises(UserError, match=words):
        parse_arguments(words_of(common | {"cache_pixels": tmp_path} | flags))


def test_a_folder_that_cannot_be_written_is_named(composed, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    args: Any = None
    with pytest.raises(UserError, match=re.escape(f"--cache_pixels {file} cannot be written")):
        refuse_pixels(composed, str(file), args)
