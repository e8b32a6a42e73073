# SPDX-License-Identifier: Apache-2.0
"""`run_log.jsonl` and what a run says of its data: before it starts, while it trains, when it goes on, at its end."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest

from moellava.data.dataset import SupervisedDataset
from moellava.data.media import MediaFiles
from moellava.data.records import load_records
from moellava.train.progress import Clock
from moellava.train.run_log import RunLog
from moellava.train.samples import first_sample, prompt_text
from moellava.vis.run_files import nested, read_lines, rounded
from tests import tiny
from tests.processes import train_here
from tests.train.test_progress import routed

EVALUATED = {"eval_strategy": "steps", "eval_steps": 4, "eval_samples": 2, "max_steps": 4, "skip_dry_save": True}
EVALUATED |= {"save_total_limit": 9}


def test_a_run_is_kept_as_numbers_and_goes_on(flags_for, parts, begin_at, tmp_path, caplog):
    flags = flags_for(tmp_path, "pretrain") | EVALUATED | {"eval_data_path": parts / "captions.json"}
    with caplog.at_level(logging.INFO, "moellava"):
        finished = train_here(flags)
    said = "\n".join(caplog.messages)
    assert "Data: 24 records, 0 skip listed" in said and "24 of them with images or videos; positions " in said
    assert "Evaluation data: 24 records" in said
    assert "The first sample; «…» is what is trained on:\n  | == Record c0 of " in said
    assert "  | <image>«a red circle" in said and "Totals: 4 steps, 8 samples, " in said
    assert "  prompt    '<image>'" in said.replace('"', "'")

    lines = read_lines(finished / "run_log.jsonl")
    assert [line["event"] for line in lines] == ["start", *["train"] * 4, "eval", "sample", "sample", "end"]
    start, *_, last = lines
    assert start["stage"] == "pretrain" and start["data"]["Data"]["samples"] == 24 and start["steps"] == 4
    assert {"python", "torch", "moellava"} <= start["versions"].keys()
    assert last["samples"] == 8 and last["tokens"] > 8 and 0 < last["training"] < last["elapsed"]
    assert {"loss", "ce", "grad_norm", "learning_rate", "tokens_per_second", "memory"} <= lines[1].keys()
    assert "step 4/4" in (finished / "run.log").read_text() and "Totals: " in (finished / "run.log").read_text()

    resumed = begin_at(2, finished, tmp_path / "resumed")
    kept = (finished / "run_log.jsonl").read_text()
    (resumed / "run_log.jsonl").write_text(kept + '{"event": "tra')
    train_here(flags | {"output_dir": resumed})
    again = read_lines(resumed / "run_log.jsonl")
    assert [(line["event"], line["step"]) for line in again] == [
        *[("start", 0), ("train", 1), ("train", 2), ("start", 2), ("train", 3), ("train", 4)],
        *[("eval", 4), ("sample", 4), ("sample", 4), ("end", 4)],
    ]
    assert (again[-1]["samples"], again[-1]["tokens"]) == (last["samples"], last["tokens"])
    assert again[-1]["elapsed"] > again[2]["elapsed"] and again[4]["loss"] == lines[3]["loss"]


def test_a_run_that_starts_anew_forgets_what_another_has_left(tmp_path):
    (tmp_path / "run_log.jsonl").write_text(
        '{"event": "train", "step": 0, "elapsed": 9}\n{"event": "train", "step": 5}\n'
    )
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=9)
    clock = Clock()
    RunLog(tmp_path, clock).on_train_begin(SimpleNamespace(world_size=1), state, None)
    assert [line["event"] for line in read_lines(tmp_path / "run_log.jsonl")] == ["start"]
    assert clock.before == 0


def test_other_processes_write_nothing(tmp_path):
    state = SimpleNamespace(is_world_process_zero=False, global_step=0, max_steps=9)
    log = RunLog(tmp_path, Clock())
    for event in (log.on_train_begin, log.on_log, log.on_train_end):
        event(SimpleNamespace(world_size=2), state, None, logs={"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_routing_is_kept_by_layers():
    line = nested({"loss": 1.23456789, "epoch": 0.5} | routed(3, 4, dead=2))
    assert line["loss"] == 1.2346 and list(line["layers"]) == ["0", "2", "4"]
    assert line["layers"]["4"]["load"] == [0.5, 0.25, 0.25, 0.0]
    assert line["layers"]["0"] | {"load": None} == {"load": None, "dead": 2, "entropy": 1.0, "dropped": 0.0}
    assert len(json.dumps(nested(routed(24, 64)))) < 24 * 64 * 12


@pytest.mark.parametrize(
    ("value", "kept"), [(float("nan"), None), (123456.7, 123460.0), (7, 7), (True, True), ("a", "a")]
)
def test_numbers_are_what_json_can_hold(value, kept):
    assert rounded(value) == kept


def test_half_a_line_is_dropped(tmp_path):
    path = tmp_path / "run_log.jsonl"
    assert read_lines(path) == []
    path.write_text('{"step": 1}\n[2]\n{"st')
    assert read_lines(path) == [{"step": 1}]


@pytest.fixture(scope="module")
def dataset(parts):
    """The conversations of the tiny model."""
    vlm = tiny.compose_tiny(parts / "lm", parts / "tower", "qwen")
    return SupervisedDataset(load_records(parts / "sft.json"), vlm.encoder, MediaFiles(parts / "images"))


def test_the_first_sample_is_shown_with_what_is_trained(dataset):
    shown = first_sample(dataset)
    text = shown.split("  | ")
    assert shown.startswith("The first sample") and "« a shape" in shown and "what is red?«" not in shown
    assert all(line.startswith("  | ") for line in shown.splitlines()[1:]) and "supervised tokens" in text[-1]
    whole = first_sample(dataset, trains_questions=True)
    assert "what is red?" in whole.split("«")[2] and "0 supervised" not in whole


def test_a_prompt_keeps_its_images_and_special_tokens(dataset):
    ids = dataset[1]["input_ids"].tolist()
    text = prompt_text(dataset.encoder.tokenizer, ids)
    assert text.count("<image>") == 1 and tiny.EOS in text and "what is in the image?" in text
    assert prompt_text(dataset.encoder.tokenizer, [-200, -200, -201]) == "<image><image><video>"
