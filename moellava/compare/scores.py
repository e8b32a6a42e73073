# SPDX-License-Identifier: Apache-2.0
"""Scores of a comparison: all models are asked the same questions, and one that has been asked is not asked again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from moellava.compare.result import Difference
from moellava.errors import UserError
from moellava.eval.asking import ask, digest_of, questions_of
from moellava.eval.benchmarks import Benchmark, Question
from moellava.eval.journal import Journal, claim
from moellava.eval.scoring import texts_of
from moellava.eval.suite import BENCHMARKS
from moellava.eval.tally import Item, Tally
from moellava.vlm import VLM


@dataclass(frozen=True)
class Exam:
    """The questions, and where answers are kept.

    Args:
        benchmark: the task.
        questions: of it.
        folder: for the answers of all models.
        batch_size: questions that run together.
    """

    benchmark: Benchmark
    questions: list[Question]
    folder: Path
    batch_size: int

    @classmethod
    def of(cls, task: str, data_folder: Path, limit: int | None, folder: Path, batch_size: int, seed: int = 0) -> Exam:
        """Reads the questions. Raises UserError as `questions_of` does, and for a task that is not scored here."""
        benchmark = BENCHMARKS[task](data_folder, None)
        if benchmark.score is None or benchmark.review is not None:
            raise UserError(f"--task {task}: a comparison needs a task that is scored here, without server or judge.")
        return cls(benchmark, questions_of(benchmark, limit, seed), folder, batch_size)

    def tally(self, vlm: VLM, name: str, checkpoint: str, changed: str = "") -> Tally:
        """What a model's answers add up to.

        Args:
            vlm: the model, as it is or changed.
            name: of the folder for its answers.
            checkpoint: hash of its files.
            changed: the intervention.

        Raises:
            UserError: answers are there that another model gave.
        """
        asked = {"questions": digest_of(self.questions), "checkpoint": checkpoint, "intervention": changed}
        folder = self.folder / name
        claim(folder, {"benchmark": self.benchmark.name, **asked}, first=True)
        said = ask(
            vlm,
            self.questions,
            max_new_tokens=self.benchmark.max_new_tokens,
            batch_size=self.batch_size,
            journal=Journal(folder),
            model_id=name,
            title=name,
        )
        assert said is not None and self.benchmark.score is not None  # one process; `of` has looked
        return self.benchmark.score(self.questions, texts_of(said)).tally


def mean_of(tallies: Sequence[Tally]) -> Tally:
    """The tally of what several models add on average, question by question."""
    rows = zip(*(tally.items for tally in tallies), strict=True)
    items = [replace(row[0], adds=tuple(map(fmean, zip(*(one.adds for one in row), strict=True)))) for row in rows]
    return Tally(items, tallies[0].statistic)


def difference(one: Sequence[Tally], other: Sequence[Tally]) -> Difference:
    """Of two models' scores, each a mean over its seeds, on the same questions."""
    mean, interval = mean_of(one).minus(mean_of(other))
    low, high = interval or (float("nan"), float("nan"))
    return Difference(mean, low, high)


def by_category(questions: Sequence[Question], tallies: Sequence[Tally]) -> dict[str, float]:
    """The score of each category of questions, a mean over the seeds; nothing where all are of one.

    Args:
        questions: all of them.
        tallies: of each seed. An item is of a question, or of those of one unit; where ids come twice (POPE, MME), the
            item's group is the category.
    """
    named = {question.category for question in questions}
    category = {key: q.category for q in questions for key in (q.unit, str(q.id))}
    parts: dict[str, list[Item]] = {}
    for item in mean_of(tallies).items:
        name = item.group if item.group in named else category[item.id]
        parts.setdefault(name, []).append(item)
    if len(parts) < 2:
        return {}
    return {name: Tally(items, tallies[0].statistic).score for name, items in sorted(parts.items())}


def pictures_of(questions: Sequence[Question]) -> int:
    """How many pictures the questions are about."""
    return len({question.cluster for question in questions})
