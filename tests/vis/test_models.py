# SPDX-License-Identifier: Apache-2.0
"""Maps over pictures for released architectures, for two towers, and for a language model that is sparse of itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from moellava.data.dataset import SupervisedDataset
from moellava.data.media import MediaFiles
from moellava.data.records import load_records
from moellava.model.compose import Composition
from moellava.moe import MoESpec, upcycle
from moellava.vis.collect import Collected, collect
from moellava.vis.measures import summarise
from moellava.vlm import VLM, compose, open_vlm
from tests import tiny
from tests.lmm.tiny import TINY
from tests.model.tiny_language_models import tiny_language_model

GRIDS = {
    "llava-1.5": [(2, 2)],
    "llava-1.6": [(2, 2), (2, 4)],
    "llava-onevision": [(2, 2), (2, 4)],
    "qwen2-vl": [(1, 2)],
    "smolvlm": [(1, 1)] * 5,
    "internvl": [(1, 1)] * 3,
    "gemma3": [(2, 2)],
    "llama-3.2-vision": [],
}
"""Architecture -> rows and columns of the grids of a picture of 160 × 100 pixels at the tiny models' sizes."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A record about a wide picture, and one about none."""
    root = tmp_path_factory.mktemp("data")
    Image.effect_mandelbrot((160, 100), (-3, -2.5, 2, 2.5), 9).convert("RGB").save(root / "wide.png")
    records = [tiny.record("a", "<image>\nwhat?", "a Shape 12.", image="wide.png"), tiny.record("b", "hello", "you")]
    (root / "data.json").write_text(json.dumps(records))
    return root


def seen_by(vlm: VLM, data: Path, upcycles: bool = True) -> Collected:
    if upcycles:
        upcycle(vlm.model, MoESpec(num_experts=[4], moe_mode="dense"))
    dataset = SupervisedDataset(load_records(data / "data.json"), vlm.encoder, MediaFiles(data))
    return collect(vlm, dataset, 2, 2)


def check(seen: Collected, grids: list[tuple[int, int]]) -> None:
    """One picture with such grids, whose cells are tokens of images, each in its place."""
    (picture,) = seen.pictures
    assert [(grid.rows, grid.columns) for grid in picture.grids] == grids
    for number, grid in enumerate(picture.grids):
        for place, row, column in grid.places():
            token = picture.first + place
            assert seen.image_T[token]
            assert (seen.grid_T[token], seen.row_T[token], seen.column_T[token]) == (number, row, column)
    assert (seen.expert_TLk >= 0).all() and summarise(seen).tokens["image"] == seen.image_T.sum()


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
def test_a_released_model_shows_where_patches_go(name, small_tokenizers, data, tmp_path):
    TINY[name].save(small_tokenizers, tmp_path / "model")
    check(seen_by(open_vlm(tmp_path / "model", device="cpu", dtype=torch.float32), data), GRIDS[name])


def test_two_towers_are_one_grid(parts, data, tmp_path):
    towers = [str(parts / "tower"), str(tiny.write_siglip(tmp_path / "siglip"))]
    check(seen_by(compose(parts / "lm", towers, Composition(version="qwen")), data), [(2, 2)])


def test_a_language_model_that_is_sparse_of_itself(parts, tokenizer_folder, data, tmp_path):
    tiny_language_model("qwen3_moe").save_pretrained(tmp_path / "base")
    shutil.copytree(tokenizer_folder, tmp_path / "base", dirs_exist_ok=True)
    vlm = compose(tmp_path / "base", str(parts / "tower"), Composition(version="qwen"))
    seen = seen_by(vlm, data, upcycles=False)
    check(seen, [(2, 2)])
    assert seen.layers == [0, 1] and seen.experts == [4, 4]
