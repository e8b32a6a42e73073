# SPDX-License-Identifier: Apache-2.0
"""The table and the picture: what is better is called so, and nothing is where nothing was found."""

from __future__ import annotations

import json

from PIL import Image

from moellava.compare.picture import draw
from moellava.compare.result import ArmResult, Comparison, Difference, Lead

BETTER, WORSE, EQUAL = Difference(0.02, 0.01, 0.03), Difference(-0.02, -0.03, -0.01), Difference(0.001, -0.01, 0.012)
PARTS = {"color": 0.85, "yes/no": 0.99}


def found() -> Comparison:
    arms = {
        "stage2": ArmResult("stage 2", [0.9], {"color": 0.8, "yes/no": 1.0}, bytes=10**6),
        "moe": ArmResult("MoE", [0.91, 0.93], PARTS, 100, 2e15, 61.0, 3 * 10**6, 5000, gain=BETTER),
        "dense": ArmResult("dense, equal steps", [0.925], PARTS, 100, 1e15, 40.0, 10**6, 5000, gain=BETTER),
        "dense-time": ArmResult("dense, equal time", [0.94], PARTS, 150, None, 60.0, 10**6, 5000, gain=BETTER),
        "noise": ArmResult("noise", [0.94], PARTS, 100, 2e15, 61.0, 3 * 10**6, 5000, gain=BETTER),
    }
    leads = [Lead("moe", "dense", EQUAL), Lead("moe", "dense-time", WORSE), Lead("noise", "dense", BETTER)]
    routing = {"averaged": ("experts averaged back into one dense MLP", [0.9, 0.9], WORSE)}
    return Comparison("easy-vqa", 1000, 200, arms, leads, routing, {"seeds": [0, 1]})


def test_the_table_says_who_is_better():
    lines = found().lines()
    assert "1,000 questions about 200 pictures" in lines[0]
    row = next(line for line in lines if line.startswith("MoE  "))
    assert "92.00" in row and "91.00 93.00" in row and "+2.00 [+1.00, +3.00]" in row and row.split()[-1] == "3.0"
    assert "MoE against dense, equal steps: +0.10 [-1.00, +1.20]: no difference that these questions show" in lines
    assert "MoE against dense, equal time: -2.00 [-3.00, -1.00]: worse" in lines
    assert "noise against dense, equal steps: +2.00 [+1.00, +3.00]: better" in lines
    head = lines.index(next(line for line in lines if line.startswith("by category")))
    assert lines[head].split()[2:] == ["color", "yes/no"]
    assert lines[head + 1].split() == ["stage", "2", "80.00", "100.00"]
    assert lines[-1].endswith("-2.00 [-3.00, -1.00]") and "averaged back" in lines[-1]
    assert Comparison("t", 1, 1, {"stage2": ArmResult("stage 2", [0.5])}).lines()[-1] == ""


def test_points_are_told_as_points():
    points = Difference(12.0, 3.0, 21.0)
    arms = {"stage2": ArmResult("stage 2", [1400.0]), "moe": ArmResult("MoE", [1412.0], gain=points)}
    lines = Comparison("mme", 10, 5, arms, [Lead("moe", "stage2", points)], scale=1).lines()
    assert lines[0].endswith("pictures; points") and "1412.00" in lines[3]
    assert "MoE against stage 2: +12.00 [+3.00, +21.00]: better" in lines


def test_the_json_holds_all_of_it():
    told = json.loads(json.dumps(found().to_json()))
    assert told["arms"]["moe"]["gain"] == {"mean": 0.02, "low": 0.01, "high": 0.03}
    assert told["routing"]["averaged"]["accuracy"] == [0.9, 0.9]


def test_the_picture_has_a_row_for_each(tmp_path):
    draw(found(), tmp_path / "all.png")
    few = found()
    few.routing = {}
    draw(few, tmp_path / "few.png")
    heights = [Image.open(tmp_path / name).height for name in ("all.png", "few.png")]
    assert heights[0] > heights[1] > 100
