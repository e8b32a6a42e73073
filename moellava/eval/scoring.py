# SPDX-License-Identifier: Apache-2.0
"""Answers to a benchmark's questions, and the report that says how they came about."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from moellava.eval.benchmarks import Benchmark, Question
from moellava.serve.answer import Answer, answer
from moellava.serve.prompt import Request
from moellava.vlm import VLM

MISTAKES_SHOWN = 20
REPORTED_PACKAGES = ("moellava", "torch", "transformers", "tokenizers", "pillow")


@dataclass(frozen=True)
class Score:
    """How many answers were right.

    Args:
        right: right answers.
        total: questions.
    """

    right: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of right answers, from 0 to 1; 0 where nothing was asked."""
        return self.right / self.total if self.total else 0.0


def answers_of(vlm: VLM, questions: list[Question], *, max_new_tokens: int, batch_size: int) -> list[Answer]:
    """One greedy answer a question, in the order of the questions."""
    requests = [Request(question=question.text, images=[question.image]) for question in questions]
    return answer(vlm, requests, max_new_tokens=max_new_tokens, batch_size=batch_size)


def score(questions: Iterable[Question], answers: Iterable[str]) -> Score:
    """Exact match: an answer is right if it is the expected text, white space around it aside."""
    hits = [said.strip() == question.answer for question, said in zip(questions, answers, strict=True)]
    return Score(sum(hits), len(hits))


def by_category(questions: list[Question], answers: Sequence[str]) -> dict[str, Score]:
    """The score of each category of questions."""
    total = Counter(question.category for question in questions)
    right = Counter(q.category for q, said in zip(questions, answers, strict=True) if said.strip() == q.answer)
    return {name: Score(right[name], total[name]) for name in sorted(total)}


def report(
    benchmark: Benchmark,
    questions: list[Question],
    answers: list[Answer],
    *,
    vlm: VLM,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """A score with all that is needed to reproduce it: prompt, decoding, versions; and the first mistakes.

    Args:
        vlm: the model that answered.
        settings: what was asked for on the command line; `score` and `conditions` are kept apart in the report.
    """
    overall = score(questions, answers)
    wrong = [(q, said) for q, said in zip(questions, answers, strict=True) if said != q.answer]
    first = Request(question=questions[0].text, images=[questions[0].image]).record
    prompt = "".join(piece.text for piece in vlm.encoder.pieces(first, opens=True))
    unanswered = [(q, said.error) for q, said in zip(questions, answers, strict=True) if said.error is not None]
    return {
        "benchmark": benchmark.name,
        "split": benchmark.split,
        "accuracy": overall.accuracy,
        "right": overall.right,
        "questions": overall.total,
        "by_category": {
            name: {**asdict(part), "accuracy": part.accuracy} for name, part in by_category(questions, answers).items()
        },
        "unanswered": [{"question": q.text, "image": q.image.name, "error": str(error)} for q, error in unanswered],
        "metric": "exact match after stripping white space",
        "prompt": {"version": vlm.encoder.version, "example": prompt},
        "settings": {"decoding": "greedy", "max_new_tokens": benchmark.max_new_tokens, **settings},
        "versions": versions(benchmark),
        "mistakes": [
            {"question": q.text, "image": q.image.name, "expected": q.answer, "answered": said}
            for q, said in wrong[:MISTAKES_SHOWN]
        ],
    }


def versions(benchmark: Benchmark) -> dict[str, str]:
    """What ran: Python, the packages that shape an answer, and the benchmark's own source."""
    packages = {name: version(name) for name in REPORTED_PACKAGES}
    return {"python": platform.python_version(), **packages, "data": benchmark.source}
