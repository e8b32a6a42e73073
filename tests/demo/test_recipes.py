# SPDX-License-Identifier: Apache-2.0
"""The recipes: their flags parse, and their promises are checked."""

from __future__ import annotations

import pytest

from moellava.demo.demo import Demo, table
from moellava.demo.recipes import DEFAULT, FULL, RECIPES, SMOKE
from moellava.train.arguments import parse_arguments
from tests.processes import ROOT

GOOD = {
    "stage2": {"accuracy": 0.99, "accuracy_shuffled_images": 0.5},
    "stage3": {"accuracy": 0.99, "accuracy_shuffled_images": 0.5},
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_the_flags_of_every_stage_parse(name, stage, tmp_path):
    demo = Demo(RECIPES[name], tmp_path, processes=2)
    model, data, moe, training = parse_arguments(demo.flags(stage))
    assert model.tune_mm_mlp_adapter == (stage == "stage1")
    assert moe.moe_enable == (stage == "stage3")
    assert training.per_device_train_batch_size * 2 == getattr(RECIPES[name], stage).batch_size
    assert data.data_path == [str(tmp_path / name / "data" / f"{stage}.json")]


def test_promises_that_are_kept():
    assert DEFAULT.missed(GOOD) == []
    assert FULL.missed(GOOD) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"accuracy": 0.89}, ["at least 90%", "under stage 2"]),
        ({"accuracy": 0.98}, ["under stage 2"]),
        ({"accuracy_shuffled_images": 0.7}, ["looks at the image"]),
    ],
)
def test_promises_that_are_not(change, words):
    missed = DEFAULT.missed({**GOOD, "stage3": {**GOOD["stage3"], **change}})
    assert len(missed) == len(words)
    assert all(word in promise for word, promise in zip(words, missed, strict=True))


def test_the_short_recipe_promises_nothing():
    assert SMOKE.missed({"stage2": {}, "stage3": {}}) == []


def test_the_table_shows_all_four_scores():
    assert table(GOOD).count("99.00%") == 2
    assert table(GOOD).count("50.00%") == 2


def test_every_page_says_the_same_time():
    said = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "scripts/demo.sh")}
    assert DEFAULT.duration in said["README.md"] and DEFAULT.duration in said["scripts/demo.sh"]
    assert FULL.duration in said["scripts/demo.sh"]
