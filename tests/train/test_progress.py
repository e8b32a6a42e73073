# SPDX-License-Identifier: Apache-2.0
"""Lines of a run: short whatever the model, with all that matters; and totals."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace

import pytest

from moellava.log import copied_to, get_logger
from moellava.train import progress
from moellava.train.progress import LONGEST, Clock, duration, format_line, percent, say_line, whole_line
from moellava.train.trainer import flat_metrics

STEP = {"loss": 1.3787, "ce": 1.3686, "aux": 1.0172, "z": 1.9817, "grad_norm": 0.8312, "learning_rate": 2e-5}
STEP |= {"tokens_per_second": 12345.6, "samples_per_second": 23.4}


def routed(layers: int, experts: int, dead: int = 0) -> dict[str, float]:
    """Log keys of a sparse model whose last layer is the most uneven one: its first expert has twice the even share."""
    metrics = {}
    for layer in range(layers):
        load = [1 / experts] * experts
        if layer == layers - 1:
            load[0], load[-1] = 2 / experts, 0.0
        metrics[f"layer_{2 * layer}"] = {"load": load, "dead": list(range(dead)), "entropy": 1.0, "dropped": 0.0}
    return flat_metrics(metrics)


@pytest.fixture
def stopped(monkeypatch):
    """Time stands still, however slow the machine is."""
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: 1000.0))


def clock_of(steps: int, seconds: float) -> Clock:
    """A clock that has run for some seconds."""
    clock = Clock()
    clock.begin(0)
    clock.began -= seconds
    return clock


@pytest.mark.parametrize(("layers", "experts"), [(0, 0), (1, 2), (1, 4), (15, 4), (24, 64), (94, 128), (1, 1)])
@pytest.mark.parametrize("large", [False, True])
def test_a_line_is_short_whatever_the_model(layers, experts, large):
    logs, step, last, clock = STEP | routed(layers, experts, 3), 20, 1000, clock_of(20, 80)
    if large:
        logs = {key: value * 1e6 if key in STEP else value for key, value in logs.items()}
        step, last, clock = 999_999, 1_000_000, clock_of(1, 1e7)
    line = format_line(step, last, logs, clock)
    assert len(line) <= LONGEST < 160 and "\n" not in line
    assert line.startswith(f"step {step}/{last}  loss ")
    for name in ("lr ", "<", *(["load ", f"in layer {2 * layers - 2}, ", f"{3 * layers} dead"] if layers else [])):
        assert name in line, (name, line)
    whole = whole_line(step, last, logs, clock)
    assert whole.count("load[") == layers and "z " in whole
    if layers > 1:
        last_layer = whole.split(f"load[{2 * layers - 2}] ")[1].split("%")[0].split()
        assert len(last_layer) == experts and last_layer[-1] == "0"


def test_a_line_says_what_it_is_read_for(stopped):
    line = format_line(20, 1000, STEP | routed(15, 4), clock_of(20, 80))
    assert line.startswith("step 20/1000  loss 1.3787  ce 1.3686  aux 1.0172  lr 2.00e-05  grad 0.831  12,346 tokens/s")
    assert " GB  1:20<1:05:20  load 0-50% in layer 28, 0 dead" in line
    assert "z " not in line.replace("  ", " ").split("aux")[1].split("lr")[0]


def test_the_most_uneven_layer_is_so_relative_to_its_experts():
    """60 % on one of 2 experts is nearer to the even share than 30 % on one of 8."""
    logs = flat_metrics({"layer_0": {"load": [0.6, 0.4]}, "layer_1": {"load": [0.3, *[0.1] * 7]}})
    assert "load 10-30% in layer 1" in format_line(1, 2, logs, Clock())


def test_an_evaluation_shows_its_scores_and_not_what_it_took(stopped):
    logs = {"eval_loss": 1.5, "eval_easy-vqa_accuracy": 0.75, "eval_runtime": 3.0, "eval_samples_per_second": 9.0}
    line = format_line(3, 6, logs, clock_of(3, 6))
    assert line == "step 3/6  eval_loss 1.5000  eval_easy-vqa_accuracy 0.7500  0:06<0:06"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3723, "1:02:03"), (3e5, "3d11h"), (1e999, "?")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("share", "text"), [(0.0, "0"), (0.004, "0.4"), (0.099, "9.9"), (0.0999, "10"), (1.0, "100")])
def test_shares(share, text):
    assert percent(share) == text


def test_a_run_that_goes_on_adds_to_what_it_was():
    clock = Clock()
    clock.begin(10, {"elapsed": 100.0, "samples": 80, "tokens": 800, "training": 60.0})
    clock.began -= 20
    clock.count(samples=40, tokens=400, seconds=20.0)
    assert clock.elapsed == pytest.approx(120, abs=1)
    assert clock.remaining(20, 30) == pytest.approx(20, abs=1)  # ten steps took 20 s here
    assert clock.totals(20).startswith(
        "Totals: 20 steps, 120 samples, 1,200 tokens; 80.0 s of training (1.50 samples/s"
    )
    numbers = clock.numbers()
    assert (numbers["samples"], numbers["tokens"], numbers["training"]) == (120, 1200, 80.0)
    assert numbers["memory"] > 1e6


def test_the_terminal_is_shown_the_short_line_and_a_file_the_whole(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "moellava"), copied_to(tmp_path / "run.log"):
        say_line(20, 1000, STEP | routed(15, 4), clock_of(20, 80))
        get_logger().info("said %s", "otherwise")
    get_logger().info("not in the file")
    first, second = (tmp_path / "run.log").read_text().splitlines()
    assert first.count("load[") == 15 and first.startswith(time.strftime("%Y-")) and second.endswith("said otherwise")
    assert "load[" not in caplog.messages[0] and len(caplog.messages[0]) < 160
