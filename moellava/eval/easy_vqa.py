# SPDX-License-Identifier: Apache-2.0
"""easy-VQA (Victor Zhou, MIT; PyPI `easy-vqa`): 9,673 test questions about 1,000 pictures of one coloured shape."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from moellava.errors import UserError
from moellava.eval.benchmarks import BENCHMARKS, Answers, Benchmark, Question, Scored
from moellava.eval.tally import Item, Tally, shares

SHAPES = frozenset({"circle", "rectangle", "triangle"})

EXACT = "exact match after stripping white space"


def score_exact(questions: Sequence[Question], answers: Answers) -> Scored:
    """Accuracy: an answer is right if it is the expected text, white space around it aside."""
    right = [
        said is not None and said.strip() == question.answer for question, said in zip(questions, answers, strict=True)
    ]
    items = [Item(str(q.id), q.cluster, (float(hit), 1.0)) for q, hit in zip(questions, right, strict=True)]
    return Scored(Tally(items), EXACT, {"by_category": shares([q.category for q in questions], right)}, right)


def easy_vqa(root: Path | None = None, split: str | None = None) -> Benchmark:
    """The official test split.

    Raises:
        UserError: the package is not installed, or another split is asked for.
    """
    if split not in (None, "test"):
        raise UserError(f"--split {split}: easy-vqa has test.")
    try:
        release = version("easy-vqa")
    except ModuleNotFoundError as error:
        raise UserError("--task easy-vqa reads the package 'easy-vqa': pip install 'moellava[demo]'") from error
    return Benchmark(
        name="easy-vqa",
        split="test",
        source=f"PyPI easy-vqa {release}",
        questions=lambda: test_questions(),
        max_new_tokens=8,
        score=score_exact,
    )


def test_questions() -> list[Question]:
    """All questions of the test split, in the package's order, which numbers them."""
    import easy_vqa as package

    paths = package.get_test_image_paths()
    rows = enumerate(zip(*package.get_test_questions(), strict=True))
    return [
        Question(text, answer, Path(paths[image]), category_of(answer), number)
        for number, (text, answer, image) in rows
    ]


def category_of(answer: str) -> str:
    """'yes/no', 'shape' or 'color': which of the 13 answers it is tells what the question is about."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "color"


BENCHMARKS["easy-vqa"] = easy_vqa
