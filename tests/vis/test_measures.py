# SPDX-License-Identifier: Apache-2.0
"""Numbers of routing, against routings whose numbers are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moellava.vis.collect import Collected, Picture
from moellava.vis.colours import PALETTE, coloured
from moellava.vis.measures import information, pathways_of, summarise
from moellava.vis.patches import Grid


def routing(first_TL: np.ndarray, image_T: np.ndarray, experts: int, **changed: Any) -> Collected:
    """Routing of one sample whose image tokens are a square, each token to two experts: the given one and its next."""
    total, layers = first_TL.shape
    side = math.isqrt(int(image_T.sum()))
    begin = int(image_T.argmax())
    places = np.full((3, total), -1)
    grid = Grid(side, side, 0, side)
    for place, row, column in grid.places() if side else ():
        places[:, begin + place] = 0, row, column
    parts: dict[str, Any] = {
        "model": "a model",
        "layers": [2 * layer for layer in range(layers)],
        "experts": [experts] * layers,
        "records": ["record <a>"],
        "sample_T": np.zeros(total, dtype=int),
        "position_T": np.arange(total),
        "image_T": image_T,
        "token_T": np.arange(total),
        "text_T": ["</script>" if not number % 7 else " word" for number in range(total)],
        "word_T": np.where(image_T, -1, 5),
        "trained_T": ~image_T & (np.arange(total) > total // 2),
        "expert_TLk": np.stack([first_TL, (first_TL + 1) % experts], axis=2).astype(np.int16),
        "gate_TLk": np.full((total, layers, 2), 0.5, dtype=np.float32),
        "kept_TLk": np.ones((total, layers, 2), dtype=bool),
        "entropy_TL": np.full((total, layers), 0.25, dtype=np.float32),
        "pictures": [Picture("record <a>", begin, side * side, [grid], Image.new("RGB", (64, 48)))] if side else [],
    } | dict(zip(("grid_T", "row_T", "column_T"), places, strict=True))
    return Collected(**parts | changed)


@pytest.fixture
def split():
    """Image tokens to expert 0, text to expert 2, in layer 0; all to 1 in layer 2. 64 of image, 64 of text."""
    image = np.arange(128) < 64
    return routing(np.stack([np.where(image, 0, 2), np.ones(128, dtype=int)], axis=1), image, 4)


def test_load_is_split_by_modality(split):
    summary = summarise(split)
    assert summary.tokens == {"all": 128, "image": 64, "text": 64}
    assert summary.load["image"][0].tolist() == [0.5, 0.5, 0, 0] and summary.load["text"][0].tolist() == [
        0,
        0,
        0.5,
        0.5,
    ]
    assert summary.load["all"][1].tolist() == [0, 0.5, 0.5, 0]
    assert summary.entropy["image"] == [0.25, 0.25] and summary.dropped == [0, 0]


def test_an_expert_tells_all_of_the_modality_or_nothing(split):
    summary = summarise(split)
    assert summary.bound["modality"] == pytest.approx(1)
    all_of_it, nothing = summary.information["modality"]
    assert all_of_it == pytest.approx(1, abs=0.05) and nothing == 0
    assert summary.bound["word_class"] == 0 and summary.information["word_class"] == [0, 0]
    by_modality = summary.by_value["modality"][0]
    assert by_modality.tolist() == [[0, 0, 0.5, 0.5], [0.5, 0.5, 0, 0]]


def test_chance_tells_nothing():
    generator = np.random.default_rng(0)
    bits = []
    for _ in range(40):
        table = np.zeros((8, 64))
        np.add.at(table, (generator.integers(0, 8, 2000), generator.integers(0, 64, 2000)), 1)
        bits.append(information(table, 2000))
    assert np.mean(bits) < 0.02  # 0.16 bits without what chance alone gives
    assert information(np.zeros((2, 3)), 0) == 0


def test_pathways_are_counted_whole():
    first = np.array([[0, 1, 2]] * 5 + [[0, 1, 3]] * 3 + [[1, 1, 1]] * 2)
    found, distinct = pathways_of(first)
    assert distinct == 3 and [path.experts for path in found] == [[0, 1, 2], [0, 1, 3], [1, 1, 1]]
    assert [path.share for path in found] == [0.5, 0.3, 0.2]
    assert pathways_of(first[:0]) == ([], 0)
    many, distinct = pathways_of(np.arange(40)[:, None])
    assert len(many) == 10 and distinct == 40


def test_drops_and_layers_of_other_widths(split):
    split.kept_TLk[:32, 0, 0] = False
    split.expert_TLk[:, 1, 1] = -1  # one choice in this layer
    split.experts = [4, 2]
    split.entropy_TL[:, 1] = np.nan
    summary = summarise(split)
    assert summary.dropped == [32 / 256, 0] and summary.load["all"][1].tolist() == [0, 1]
    assert math.isnan(summary.entropy["text"][1])


def test_colours_are_enough_or_the_most_frequent():
    assert coloured(np.array([3, 3]), 4) == dict(enumerate(PALETTE[:4]))
    found = coloured(np.array([9, 9, 9, 5, 5, 60, -1]), 64)
    assert list(found) == [9, 5, 60] and found[9] == PALETTE[0]
    assert len(coloured(np.arange(64), 64)) == len(PALETTE) - 1
