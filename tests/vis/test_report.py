# SPDX-License-Identifier: Apache-2.0
"""`moellava report`: a run as one page, from its log or the Trainer's, while it trains and at its end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moellava.cli import main
from moellava.errors import UserError
from moellava.moe import MoESpec
from moellava.moe.certificate import Certificate
from moellava.train.arguments import parse_arguments
from moellava.train.trainer import flat_metrics
from moellava.vis import needed
from moellava.vis.run_files import COLUMNS, POINTS, Run, loads_of, nested, open_run
from moellava.vis.run_page import page_data, run_page
from tests.processes import train_here
from tests.vis.test_routing import check_page


def write_run(folder: Path, steps: int, layers: int = 2, experts: int = 4) -> Path:
    """The folder of a run that is at some step: its log, what trained, its certificate."""
    folder.mkdir()
    lines = [
        {"event": "start", "step": 0, "steps": 2 * steps, "stage": "moe", "processes": 2, "versions": {"torch": "1"}}
    ]
    lines[0]["data"] = {"Data": {"records": 9, "samples": 8}}
    for step in range(1, steps + 1):
        load = [2 / experts, *[1 / experts] * (experts - 2), 0.0]
        routing = flat_metrics({f"layer_{layer}": {"load": load, "dead": [experts - 1]} for layer in range(layers)})
        numbers = {"loss": 3 / step, "learning_rate": 1e-3, "grad_norm": 0.5, "tokens_per_second": 9.0, "memory": 2e9}
        sums = {"elapsed": 2.0 * step, "training": 1.0 * step, "samples": 4.0 * step, "tokens": 40.0 * step}
        lines.append({"event": "train", "step": step} | nested(numbers | routing) | sums)
    lines.append({"event": "eval", "step": steps, "eval_loss": 0.25, "eval_easy-vqa_accuracy": 0.75, "eval_runtime": 3})
    lines.append(
        {"event": "sample", "step": steps, "record": "r", "prompt": "<image>", "answer": "<b>", "reference": "x"}
    )
    (folder / "run_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "parameters.json").write_text(json.dumps({"experts": {"trainable": 12345, "frozen": 0}}))
    probe = {"tokens": 9, "max_abs_delta": 0.5, "largest_logit": 2.0, "kl": 0.1}
    Certificate(True, MoESpec().to_config(), "float32", 1e-4, {"text": probe}).save(folder)
    return folder


@pytest.mark.slow
def test_a_report_takes_the_place_of_the_one_before(tmp_path):
    folder = write_run(tmp_path / "run", 2)
    for words in ("2 of 4", "3 of 4"):
        assert main(["report", str(folder)]) == 0
        assert words in (folder / "report" / "report.html").read_text()
        with (folder / "run_log.jsonl").open("a") as log:
            log.write('{"event": "train", "step": 3, "loss": 1.0}\n{"event": "tra')
    assert len(list((folder / "report").iterdir())) == 3


def test_a_run_that_is_under_way_is_reported(tmp_path, capsys):
    folder = write_run(tmp_path / "run", 5)
    assert main(["report", str(folder)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert {path.name for path in (folder / "report").iterdir()} == {"report.html", "run.png", "experts.png"}
    text = (folder / "report" / "report.html").read_text()
    shown = check_page(text)
    for words in (
        "5 of 10",
        "not finished",
        "20 (4.00 a second",
        "12,345",
        "max |Δlogit| 5.00e-01",
        "&lt;b&gt;",
        "torch",
    ):
        assert words in text
    titles = [chart["title"] for chart in shown["charts"]]
    assert titles == [
        *("loss", "learning rate", "norm of the gradient", "tokens a second", "most memory, GB"),
        "easy-vqa_accuracy",
    ]
    loss = shown["charts"][0]
    assert loss["x"] == [1, 2, 3, 4, 5] and loss["series"][1]["y"] == [None, None, None, None, 0.25]
    assert shown["charts"][4]["series"][0]["y"] == [2.0] * 5
    assert (
        shown["loads"]["of_layer"][1] == [[2] * 5, [1] * 5, [1] * 5, [0] * 5] and shown["loads"]["dead"][0] == [1] * 5
    )
    assert shown["loads"]["unevenness"] == [[2] * 5] * 2


def test_a_long_run_is_drawn_with_few_points(tmp_path):
    run = open_run(write_run(tmp_path / "run", 1001, layers=3, experts=16))
    steps, values = run.series("train", "loss")
    assert len(steps) <= POINTS and steps[-1] == 1001 and values[0] == pytest.approx(np.mean([3, 1.5, 1]), rel=1e-4)
    loads = loads_of(run)
    assert len(loads.steps) == COLUMNS and (loads.steps[0], loads.steps[-1]) == (1, 1001)
    assert loads.of_layer[2].shape == (16, COLUMNS)
    assert len(run_page(run)) < 400_000


def test_the_trainers_own_log_is_read_where_there_is_no_other(tmp_path):
    """It has its keys in the order of the alphabet, expert 10 before expert 2."""
    load = [number / 78 for number in range(12)]
    logs = flat_metrics({f"layer_{layer}": {"load": load, "dead": [0]} for layer in (0, 2, 10)}) | {
        "loss": 1.0,
        "step": 4,
    }
    history = [dict(sorted(logs.items())), {"eval_loss": 2.0, "step": 4}, {"train_runtime": 5.0, "step": 4}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    run = open_run(tmp_path)
    loads = loads_of(run)
    assert loads.layers == ["0", "2", "10"] and loads.of_layer[0][:, 0] == pytest.approx(12 * np.array(load), rel=1e-4)
    assert run.series("eval", "eval_loss") == ([4], [2.0]) and len(run.lines) == 2


def test_a_dense_run_has_no_experts(tmp_path):
    run = Run(tmp_path, [{"event": "train", "step": 1, "loss": 2.0}], {}, [], {}, True)
    assert loads_of(run) is None and "loads" not in page_data(run) and "Experts over time" not in run_page(run)


def test_a_run_that_has_just_begun_is_reported(tmp_path):
    (tmp_path / "run_log.jsonl").write_text('{"event": "start", "step": 0, "steps": 9}\n')
    assert main(["report", str(tmp_path)]) == 0
    assert "0 of 9" in (tmp_path / "report" / "report.html").read_text()


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["report", str(write_run(tmp_path / "run", 1)), "--output", str(tmp_path / "file")]) == 2
    assert "--output" in capsys.readouterr().err


def test_a_run_writes_its_own_report(flags_for, tmp_path):
    short = {"max_steps": 3, "logging_steps": 2, "save_strategy": "no", "skip_dry_save": True, "report_html": True}
    folder = train_here(flags_for(tmp_path, "pretrain") | short)
    text = (folder / "report" / "report.html").read_text()
    assert "finished" in text and "projector" in text and check_page(text)["charts"][0]["x"] == [2]
    lines = open_run(folder).lines
    assert [(line["event"], line["step"]) for line in lines[1:]] == [("train", 2), ("train", 3), ("end", 3)]
    assert lines[2]["ce"] > 0 and lines[3]["samples"] == 6
    assert "--report_html" not in json.loads((folder / "run.json").read_text())["identity"]


def test_a_report_that_could_not_be_written_is_refused_before_the_run(monkeypatch):
    monkeypatch.setattr(needed, "find_spec", lambda name: None)
    words = "--model_name_or_path m --data_path a.json --output_dir o --report_to none --report_html True"
    with pytest.raises(UserError, match="--report_html True needs matplotlib"):
        parse_arguments(words.split())
