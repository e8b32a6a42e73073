# SPDX-License-Identifier: Apache-2.0
"""What a benchmark is: questions about images with one right answer each."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from moellava.errors import UserError
from moellava.registry import Registry


@dataclass(frozen=True)
class Question:
    """One question of a benchmark."""

    text: str
    answer: str
    image: Path
    category: str
    """What it asks about; scores are also given per category."""


@dataclass(frozen=True)
class Benchmark:
    """A published set of questions, and how it is scored: exact match after stripping white space."""

    name: str
    split: str
    source: str
    """Where it comes from, with its version, as written beside a score."""
    questions: Callable[[], list[Question]]
    max_new_tokens: int
    """Tokens that the longest right answer may take, terminator included."""


BENCHMARKS: Registry[Callable[[], Benchmark]] = Registry("benchmark")
"""name -> a function that makes the Benchmark; a missing package is a UserError there."""


def shuffle_images(questions: list[Question], seed: int) -> list[Question]:
    """The same questions, each with the image of another one; no question keeps its own.

    A model that answers from the text alone scores the same on both, so that the gap is what the images are worth.
    Questions are put in a random order image by image, and the images move on by half of the list: further than any
    image's questions reach, which makes it a derangement.

    Raises:
        UserError: one image has more than half of the questions, so that there is no such order.
    """
    paths = sorted({question.image for question in questions})
    random.Random(seed).shuffle(paths)
    place = {path: number for number, path in enumerate(paths)}
    order = sorted(range(len(questions)), key=lambda index: (place[questions[index].image], index))
    half = len(order) // 2
    longest = max((len(list(group)) for _, group in groupby(questions[i].image for i in order)), default=0)
    if longest > half:
        raise UserError(f"--shuffle-images: one image has {longest} of the {len(order)} questions; take more questions")
    shuffled = list(questions)
    for position, index in enumerate(order):
        shuffled[index] = replace(questions[index], image=questions[order[position - half]].image)
    return shuffled
