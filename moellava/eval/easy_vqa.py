# SPDX-License-Identifier: Apache-2.0
"""easy-VQA (Victor Zhou, MIT; PyPI `easy-vqa`): 9,673 test questions about 1,000 pictures of one coloured shape."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from moellava.errors import UserError
from moellava.eval.benchmarks import BENCHMARKS, Benchmark, Question

SHAPES = frozenset({"circle", "rectangle", "triangle"})


def easy_vqa() -> Benchmark:
    """The official test split.

    Raises:
        UserError: the package is not installed.
    """
    try:
        release = version("easy-vqa")
    except ModuleNotFoundError as error:
        raise UserError("--benchmark easy-vqa reads the package 'easy-vqa': pip install 'moellava[demo]'") from error
    return Benchmark(
        name="easy-vqa", split="test", source=f"PyPI easy-vqa {release}", questions=test_questions, max_new_tokens=8
    )


def test_questions() -> list[Question]:
    """All questions of the test split, in the package's order."""
    import easy_vqa as package

    paths = package.get_test_image_paths()
    rows = zip(*package.get_test_questions(), strict=True)
    return [Question(text, answer, Path(paths[image]), category_of(answer)) for text, answer, image in rows]


def category_of(answer: str) -> str:
    """'yes/no', 'shape' or 'color': which of the 13 answers it is tells what the question is about."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "color"


BENCHMARKS.register("easy-vqa", easy_vqa)
