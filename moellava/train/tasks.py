# SPDX-License-Identifier: Apache-2.0
"""Benchmarks while a model trains (`--eval_task easy-vqa --eval_steps N`): scores in the log and for TensorBoard.

Questions and scores are those of `moellava eval`, of the model as it stands; its weights, and what is drawn for the
steps that follow, stay as they are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from moellava.errors import UserError
from moellava.eval.asking import Share, questions_of, request_of
from moellava.eval.benchmarks import Benchmark, Question
from moellava.eval.suite import BENCHMARKS
from moellava.log import get_logger, is_rank_zero
from moellava.model.features import FeatureCache
from moellava.processes import joined_over_processes, rank, world_size
from moellava.serve.answer import answer
from moellava.train.fsdp import gathered
from moellava.train.progress import SCORE
from moellava.train.samples import is_common_effort

logger = get_logger(__name__)

SEED = 0
"""Draws the questions of `--eval_task_limit`: the same ones every time, and those that `moellava eval --limit` asks."""


class TaskScores(TrainerCallback):
    """Scores the model on benchmarks every so many steps, and at the end.

    The processes share the questions. Where parameters or experts are split over them a forward is a common effort:
    then all ask the same.

    Args:
        trainer: whose model it is.
        tasks: benchmarks with their questions, of `tasks_of`.
        batch_size: questions that run together on a process.
    """

    def __init__(self, trainer: Any, tasks: Sequence[tuple[Benchmark, list[Question]]], batch_size: int):
        self.trainer, self.tasks, self.batch_size = trainer, tasks, batch_size

    def on_step_end(self, args, state, control, **kwargs):
        """Scores after the steps that are due, on all processes."""
        ends = state.global_step >= state.max_steps
        if (state.global_step % state.eval_steps and not ends) or (control.should_training_stop and not ends):
            return
        began = time.perf_counter()
        scores = {f"{SCORE}{benchmark.name}": self._score(benchmark, asked) for benchmark, asked in self.tasks}
        step_is_logged = control.should_log
        self.trainer.log(scores)
        control.should_log = step_is_logged  # a line that is written takes that of the step itself for written
        self.trainer.interval_start += time.perf_counter() - began  # the throughput that is logged is that of training

    def _score(self, benchmark: Benchmark, questions: list[Question]) -> float:
        vlm = self.trainer.vlm
        vlm.features = FeatureCache()  # what pictures were before the last steps
        share = Share() if is_common_effort(self.trainer.model) else Share(rank(), world_size())
        places = share.of(range(len(questions)))
        asked = [request_of(questions[place]) for place in places]
        with gathered(vlm.model):
            said = answer(vlm, asked, max_new_tokens=benchmark.max_new_tokens, batch_size=self.batch_size)
        own = {place: None if text.error else str(text) for place, text in zip(places, said, strict=True)}
        vlm.features = FeatureCache()  # memory that the next steps may need
        joined = joined_over_processes(own)
        assert benchmark.score is not None  # see `tasks_of`
        tally = benchmark.score(questions, [joined[place] for place in range(len(questions))]).tally
        if is_rank_zero():
            interval = tally.interval()
            sure = f", 95%% interval {interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
            told = f"Step %d: {SCORE}%s %.4f of %d questions{sure}"
            logger.info(told, self.trainer.state.global_step, benchmark.name, tally.score, len(questions))
        return tally.score


def tasks_of(names: Sequence[str], folder: str, limit: int | None) -> list[tuple[Benchmark, list[Question]]]:
    """Benchmarks by name with the questions that are asked.

    Raises:
        UserError: data is missing, or a task is not scored here.
    """
    found = []
    for name in names:
        benchmark = BENCHMARKS[name](Path(folder), None)
        if benchmark.score is None or benchmark.review is not None:
            who = "a judge" if benchmark.review is not None else "its own server"
            raise UserError(f"--eval_task {name} is scored by {who}, not while a model trains: use `moellava eval`.")
        found.append((benchmark, questions_of(benchmark, limit, SEED)))
    return found
