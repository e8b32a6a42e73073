# SPDX-License-Identifier: Apache-2.0
"""Asks a model the questions of a benchmark: in batches, by one process or several, each question once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from moellava.errors import UserError
from moellava.eval.benchmarks import Benchmark, Question
from moellava.eval.journal import Journal
from moellava.eval.progress import Progress
from moellava.serve.answer import answer
from moellava.serve.prompt import Request
from moellava.vlm import VLM

BATCHES_A_ROUND = 4
"""Batches between two writes of the journal. Questions of a round share batches by their length."""

SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class Said:
    """What came of one question.

    Args:
        text: the answer; None where there is none.
        error: why.
    """

    text: str | None
    error: str | None = None


@dataclass(frozen=True)
class Share:
    """The part of the questions that a process asks.

    Args:
        rank, world: of the process, and how many there are.
    """

    rank: int = 0
    world: int = 1

    def of(self, places: Iterable[int]) -> list[int]:
        """Those of some places that are this process's, whatever else has been answered."""
        return [place for place in places if place % self.world == self.rank]


def questions_of(benchmark: Benchmark, limit: int | None, seed: int) -> list[Question]:
    """What is asked of a benchmark: its questions, or so many of them (see `limited`).

    Raises:
        UserError: data that is missing or damaged, images that are not there, or no question.
    """
    questions = limited(benchmark.questions(), limit, seed)
    if not questions:
        raise UserError(f"--task {benchmark.name}: {benchmark.source} holds no question.")
    _require_images(questions, benchmark.name)
    return questions


def limited(questions: list[Question], limit: int | None, seed: int) -> list[Question]:
    """So many questions, drawn at random, in their order; those of one unit together, which counts as one."""
    units = list(dict.fromkeys(question.unit or str(place) for place, question in enumerate(questions)))
    if limit is None or limit >= len(units):
        return questions
    drawn = {units[place] for place in random.Random(seed).sample(range(len(units)), limit)}
    return [question for place, question in enumerate(questions) if (question.unit or str(place)) in drawn]


def digest_of(questions: Sequence[Question]) -> str:
    """A hash of what is asked, about which images."""
    digest = blake2b(digest_size=16)
    for question in questions:
        digest.update(repr((question.id, question.text, question.cluster)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _require_images(questions: Sequence[Question], task: str) -> None:
    """Raises UserError where images are not there: a score without them would be compared with one that has them."""
    files = {question.image for question in questions if isinstance(question.image, Path)}
    missing = sorted(str(path) for path in files if not path.is_file())
    if missing:
        raise UserError(f"--task {task}: {len(missing)} of {len(files)} images are not there, such as {missing[0]}")


def request_of(question: Question) -> Request:
    """A question as the model is asked it."""
    return Request(question=question.text, images=[] if question.image is None else [question.image])


def ask(
    vlm: VLM,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    batch_size: int,
    journal: Journal | None = None,
    share: Share | None = None,
    model_id: str = "",
    title: str = "questions",
) -> list[Said] | None:
    """One greedy answer a question, in the order of the questions; None in all processes but the first.

    Args:
        vlm: the model.
        questions: what is asked.
        max_new_tokens: longest answer, in tokens.
        batch_size: questions that run together.
        journal: where answers are kept, and those of an earlier run are found; several processes need it.
        share: which questions are this process's.
        model_id: the model's name in the lines of the journal.
        title: what the progress is called.

    Raises:
        UserError: the model cannot be asked here, or the journal is damaged.
    """
    share = share or Share()
    rows = {} if journal is None else journal.known()
    pending = share.of(place for place in range(len(questions)) if place not in rows)
    with Progress(title, len(questions), len(rows)) as progress:
        size = batch_size * BATCHES_A_ROUND
        for start in range(0, len(pending), size):
            places = pending[start : start + size]
            asked = [request_of(questions[place]) for place in places]
            said = answer(vlm, asked, max_new_tokens=max_new_tokens, batch_size=batch_size)
            new = {
                place: line_of(place, questions[place], text, None if text.error is None else str(text.error), model_id)
                for place, text in zip(places, said, strict=True)
            }
            rows |= new
            if journal is not None:
                journal.add(new.values())
            progress.add(len(places))
        if journal is None:
            return said_in(rows, len(questions))
        if share.rank > 0:
            return None
        rows = _when_all_are_there(journal, len(questions), progress)
    journal.finish(rows[place] for place in range(len(questions)))
    return said_in(rows, len(questions))


def _when_all_are_there(journal: Journal, total: int, progress: Progress) -> dict[int, dict[str, Any]]:
    """Every line, once the other processes have written theirs. Whoever has started them ends this one with them."""
    rows: dict[int, dict[str, Any]] = {}
    while len(rows) < total:
        done = journal.count()
        progress.at(min(done, total))
        if done >= total:
            rows = journal.known()
        if len(rows) < total:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    if extra := sorted(rows.keys() - range(total)):
        raise UserError(f"{journal.folder} holds answers to questions that there are not, such as number {extra[0]}.")
    return rows


def line_of(place: int, question: Question, text: str, error: str | None, model_id: str) -> dict[str, Any]:
    """An answer as LLaVA's scripts write it, MMBench's fields included; `metadata` holds place and error.

    The prompt is the question as it was asked, without the model's template.
    """
    known = ("round_id", "options", "option_char")
    name = blake2b(f"{model_id} {place}".encode("utf-8", "backslashreplace"), digest_size=11).hexdigest()
    return {
        "question_id": question.id,
        **{key: question.notes[key] for key in known if key in question.notes},
        "prompt": question.text,
        "text": str(text),
        "answer_id": name,
        "model_id": model_id,
        "metadata": {"index": place, **({} if error is None else {"error": error})},
    }


def said_in(rows: dict[int, dict[str, Any]], total: int) -> list[Said]:
    """What the lines of a journal say, in the order of the questions."""
    found = [(rows[place]["text"], rows[place]["metadata"].get("error")) for place in range(total)]
    return [Said(text if error is None else None, error) for text, error in found]


def reviewed(
    review: Callable[[Question, str], str],
    questions: Sequence[Question],
    said: Sequence[Said],
    ask_judge: Callable[[Sequence[str]], list[str]],
    *,
    journal: Journal | None,
    at_once: int,
    title: str,
) -> list[str]:
    """What a judge says to each answer, in order; kept in a journal as answers are.

    Args:
        review: what the judge is asked about an answer.
        questions, said: a benchmark, and what was answered.
        ask_judge: texts -> replies.
        journal: where replies are kept.
        at_once: texts that are given to the judge together.
        title: what the progress is called.
    """
    rows = {} if journal is None else journal.known()
    pending = [place for place in range(len(questions)) if place not in rows]
    with Progress(title, len(questions), len(rows)) as progress:
        for start in range(0, len(pending), at_once):
            places = pending[start : start + at_once]
            prompts = [review(questions[place], said[place].text or "") for place in places]
            new = {
                place: {"question_id": questions[place].id, "text": reply, "metadata": {"index": place}}
                for place, reply in zip(places, ask_judge(prompts), strict=True)
            }
            rows |= new
            if journal is not None:
                journal.add(new.values())
            progress.add(len(places))
    if journal is not None:
        journal.finish(rows[place] for place in range(len(questions)))
    return [rows[place]["text"] for place in range(len(questions))]
