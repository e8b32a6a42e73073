# SPDX-License-Identifier: Apache-2.0
"""The demo's second task: what there is to know, how it is told, what is asked, and the commands."""

from __future__ import annotations

import json
import sys
from collections import Counter

import pytest

from moellava.demo.easy_vqa_data import train_images
from moellava.demo.mixed import DEFAULT, MixedDemo
from moellava.demo.mixed_data import KNOW, LOOK, SEE, Sizes, World, questions, records, unseen_images
from moellava.train.arguments import parse_arguments
from tests.processes import run

SIZES = Sizes(people=6, goods=5, lookers=2, words=4, turns=4)


def test_every_fact_is_told_as_often_and_as_it_is():
    world, images = World.of(SIZES), train_images()
    assert world == World.of(SIZES) and len(world.known) == 30 and len(world.seen) == 2 * 24
    written = records(world, images, SIZES, copies=2, seed=0)
    assert written == records(world, images, SIZES, copies=2, seed=0)
    told: Counter[tuple[str, str]] = Counter()
    for record in written:
        said = [turn["value"] for turn in record["conversations"]]
        if "image" not in record:
            told.update(zip(said[::2], said[1::2], strict=True))
    assert told == dict.fromkeys(world.facts(), 2)
    shown = [record for record in written if "image" in record]
    assert len(shown) == len(written) / 2
    by_name = {image.path.name: image for image in images}
    for record in shown:
        said = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        image = by_name[record["image"]]
        assert set(zip(said[::2], said[1::2], strict=True)) <= {*image.turns, *world.about(image.facts)}


def test_pictures_that_are_asked_about_are_of_the_test_split():
    asked = questions(World.of(SIZES), unseen_images(), each=20, seed=0)
    assert set(Counter(row["category"] for row in asked).values()) == {20}
    assert all("/test/" in row["image"] for row in asked if row["category"] in (LOOK, SEE))
    assert not any("image" in row for row in asked if row["category"] not in (LOOK, SEE))


def test_the_flags_of_its_commands_parse(tmp_path):
    demo = MixedDemo(DEFAULT, tmp_path)
    model, _, moe, training = parse_arguments(demo.stage2()[3:])
    assert not moe.moe_enable and model.untrained_projector and training.learning_rate == DEFAULT.learning_rate
    command = demo.comparing()
    assert command[:2] == ["moellava", "compare"] and "--num_experts" in command[command.index("--") :]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_mixed_task_runs_once_and_tells_each_skill(tmp_path):
    words = [sys.executable, "-m", "moellava.cli", "demo", "--smoke", "--task", "mixed", "--output-dir", str(tmp_path)]
    first = run(words, timeout=850, cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    told = json.loads((tmp_path / "mixed-smoke" / "compare" / "compare.json").read_text())
    assert list(told["arms"]) == ["stage2", "moe", "dense", "dense-flops", "dense-time"]
    for arm in told["arms"].values():
        assert set(arm["by_category"]) == {KNOW, LOOK, SEE}
    assert "MoE against dense, equal steps" in first.stdout and "by category" in first.stdout
    again = run(words, timeout=850, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.count("done before") == 3
