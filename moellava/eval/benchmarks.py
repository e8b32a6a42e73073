# SPDX-License-Identifier: Apache-2.0
"""What a benchmark is: where its questions lie, how answers are scored, and what its server takes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from moellava.errors import UserError
from moellava.eval.tally import Tally
from moellava.registry import Registry

SINGLE_WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
"""What LLaVA-1.5 puts behind a question, where a question file does not hold it already."""


@dataclass(frozen=True)
class Question:
    """One question of a benchmark."""

    text: str
    answer: Any
    """What the scorer compares with, in the benchmark's own shape; None where it is not published."""
    image: str | Path | None
    """A file, a data URI, or None for a question about no image."""
    category: str
    """What it asks about; scores are also given per category."""
    id: str | int = ""
    """`question_id` in the benchmark's files. Some use one twice."""
    about: str = ""
    """The image's name, where it is not that of the file: questions about one image are no independent draws."""
    unit: str = ""
    """Questions of one unit count together: MME's two about an image, MMBench's one with its options in turn."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the answer file (MMBench's `options`), and what the scorer needs beside the answer."""

    @property
    def cluster(self) -> str:
        """The image's name; of a question about no image, its own."""
        if self.about:
            return self.about
        return Path(self.image).name if self.image is not None else f"question {self.id}"


@dataclass(frozen=True)
class Scored:
    """A score, and what it is made of.

    Args:
        tally: what each question adds.
        metric: how answers are scored, in words.
        measures: further numbers by name, as they are written into the result.
        right: for each question, whether its answer counts as wholly right; None where that means nothing.
    """

    tally: Tally
    metric: str
    measures: dict[str, Any] = field(default_factory=dict)
    right: Sequence[bool] | None = None


Answers = Sequence["str | None"]
"""What was said to each question; None where there is no answer."""

Scorer = Callable[[Sequence[Question], Answers], Scored]


@dataclass(frozen=True)
class Submission:
    """The file that a benchmark's own server or script takes.

    Args:
        name: of the file.
        write: (path, questions, answers) writes it.
    """

    name: str
    write: Callable[[Path, Sequence[Question], Answers], None]


@dataclass(frozen=True)
class Benchmark:
    """A published set of questions.

    Args:
        name: as `--task` has it.
        split: of the published ones.
        source: where it comes from, with its version, as written beside a score.
        questions: reads them.
        max_new_tokens: tokens that the longest right answer may take, terminator included.
        score: None where the right answers are not there, so that only its server can.
        submissions: further files.
        review: for answers that a judge grades: (question, answer) -> what the judge is asked. `score` then gets what
            the judge said in place of the answers.
    """

    name: str
    split: str
    source: str
    questions: Callable[[], list[Question]]
    max_new_tokens: int
    score: Scorer | None
    submissions: Sequence[Submission] = ()
    review: Callable[[Question, str], str] | None = None


BENCHMARKS: Registry[Callable[[Path, str | None], Benchmark]] = Registry("benchmark")
"""name -> (folder of all benchmarks, split or None) -> the Benchmark. What is missing is a UserError there."""


def shuffle_images(questions: list[Question], seed: int) -> list[Question]:
    """The same questions, each with the image of another one; no question keeps its own.

    A model that answers from the text alone scores the same on both, so that the gap is what the images are worth.
    Questions are put in a random order image by image, and the images move on by half of the list: further than any
    image's questions reach, which makes it a derangement. Questions about no image stay as they are.

    Raises:
        UserError: one image has more than half of the questions, so that there is no such order.
    """
    shown = [index for index, question in enumerate(questions) if question.image is not None]
    paths = sorted({str(questions[index].image) for index in shown})
    random.Random(seed).shuffle(paths)
    place = {path: number for number, path in enumerate(paths)}
    order = sorted(shown, key=lambda index: (place[str(questions[index].image)], index))
    half = len(order) // 2
    longest = max((len(list(group)) for _, group in groupby(questions[i].image for i in order)), default=0)
    if longest > half:
        raise UserError(f"--shuffle-images: one image has {longest} of the {len(order)} questions; take more questions")
    shuffled = list(questions)
    for position, index in enumerate(order):
        other = questions[order[position - half]]
        shuffled[index] = replace(questions[index], image=other.image, about=other.cluster)
    return shuffled
