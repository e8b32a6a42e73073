# SPDX-License-Identifier: Apache-2.0
"""Benchmarks during training: what `moellava eval` scores, in the log and for TensorBoard, without touching the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moellava.errors import UserError
from moellava.eval.asking import limited, request_of
from moellava.eval.easy_vqa import easy_vqa
from moellava.serve.answer import Answer, answer
from moellava.train import tasks
from moellava.train.tasks import tasks_of
from tests.eval.miniatures import pope, vqav2
from tests.processes import run as run_command
from tests.processes import train_command, train_here
from tests.tiny import reopen

EASY = {"eval_task": "easy-vqa", "eval_task_limit": 5, "eval_steps": 2, "save_strategy": "no"}


@pytest.fixture
def run(flags_for, tmp_path):
    """(name, flags) -> the folder of a short stage 2."""

    def start(name, **flags):
        flags = {"output_dir": tmp_path / name, "pretrain_mm_mlp_adapter": None, "untrained_projector": True} | flags
        return train_here(flags_for(tmp_path, "finetune") | {"max_steps": 3} | flags)

    return start


def scores_of(folder: Path, name: str) -> dict[int, float]:
    """step -> score of a run's log."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {row["step"]: row[f"eval_score/{name}"] for row in history if f"eval_score/{name}" in row}


def test_the_model_is_asked_as_the_command_asks_it_and_no_loss_changes(run, losses_of, monkeypatch):
    said = []
    monkeypatch.setattr(tasks, "answer", lambda *args, **options: said.append(answer(*args, **options)) or said[-1])
    folder = run("with", **EASY, report_to="tensorboard")
    scores = scores_of(folder, "easy-vqa")
    assert list(scores) == [2, 3] and len(said) == 2
    asked = [request_of(question) for question in limited(easy_vqa().questions(), 5, seed=0)]
    assert said[1] == answer(reopen(folder), asked, max_new_tokens=8) and any(said[1])
    losses = losses_of(folder)
    assert list(losses) == [1, 2, 3] and losses == losses_of(run("without", save_strategy="no"))
    (events,) = folder.rglob("events.out.*")
    board = EventAccumulator(str(events)).Reload()
    assert [event.step for event in board.Scalars("eval/score/easy-vqa")] == [2, 3]


def test_a_task_lies_in_its_folder(run, tmp_path, caplog, monkeypatch):
    """A model that denies nothing finds all that is there, and half of what it finds is not."""
    monkeypatch.setattr(tasks, "answer", lambda vlm, requests, **options: [Answer("yes")] * len(requests))
    pope(tmp_path / "data")
    folder = run("pope", eval_task="pope", eval_task_folder=tmp_path / "data", eval_steps=0.5, save_strategy="no")
    assert scores_of(folder, "pope") == pytest.approx({2: 2 / 3, 3: 2 / 3})
    assert "eval_score/pope 0.6667 of 12 questions" in caplog.text


def test_a_task_that_is_not_there_is_told_before_weights_are_read(run, tmp_path, monkeypatch):
    monkeypatch.setattr("moellava.train.assemble.build", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(UserError, match=r"pope"):
        run("pope", eval_task="pope", eval_task_folder=tmp_path / "none", eval_steps=0.5, save_strategy="no")


def test_what_is_not_scored_here_is_refused(tmp_path):
    vqav2(tmp_path)
    with pytest.raises(UserError, match="--eval_task vqav2 is scored by its own server"):
        tasks_of(["vqav2"], str(tmp_path), None)


@pytest.mark.slow
def test_two_processes_share_the_questions(flags_for, tmp_path):
    pope(tmp_path / "data")
    flags = {"pretrain_mm_mlp_adapter": None, "untrained_projector": True, "max_steps": 2, "eval_steps": 2}
    flags |= {"eval_task": "pope", "eval_task_folder": tmp_path / "data", "output_dir": tmp_path / "two"}
    command = train_command(flags_for(tmp_path, "finetune") | flags, processes=2)
    finished = run_command(command, timeout=300)
    assert finished.returncode == 0, finished.stderr
    (score,) = scores_of(tmp_path / "two", "pope").values()
    assert "score/pope" in finished.stderr and 0 <= score <= 1  # all twelve have an answer, or it would have failed
