# SPDX-License-Identifier: Apache-2.0
"""Benchmarks whose answers a language model grades: LLaVA-Bench (in the wild) and MM-Vet.

What the judge is asked follows the published protocols in words of our own, and judges differ: compare scores that
one judge has given, not with those of papers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moellava.errors import UserError
from moellava.eval.benchmarks import BENCHMARKS, Answers, Benchmark, Question, Scored, Submission
from moellava.eval.layout import Layout, json_of, lines_of, text_of, value_of
from moellava.eval.tally import Item, Tally, shares
from moellava.files import write_json

TOKENS = 1024
"""As LLaVA's scripts."""

NUMBER = re.compile(r"\d+(?:\.\d+)?")


def pair_of_scores(said: str | None) -> tuple[float, float] | None:
    """The two scores, of the reference and of the answer, in the first line of what a judge said; None where there are
    not two from 0 to 10."""
    line = (said or "").strip().split("\n")[0]
    found = [float(number) for number in NUMBER.findall(line)]
    return (found[0], found[1]) if len(found) == 2 and max(found) <= 10 else None


def score_llava_bench(questions: Sequence[Question], verdicts: Answers) -> Scored:
    """The answers' mean score by the reference answers' (arXiv:2304.08485, section 5.1), overall and by category.

    Verdicts are what the judge said; those that hold no two scores are left out, and counted.
    """
    pairs = [pair_of_scores(verdict) for verdict in verdicts]
    items = [
        Item(str(q.id), q.cluster, (0.0, 0.0) if pair is None else (pair[1], pair[0]))
        for q, pair in zip(questions, pairs, strict=True)
    ]
    categories = sorted({question.category for question in questions})
    named = {
        name: Tally([item for item, q in zip(items, questions, strict=True) if q.category == name])
        for name in categories
    }
    judged = [pair for pair in pairs if pair is not None]
    measures = {
        "by_category": {name: ratio_of(tally) for name, tally in named.items()},
        "mean_score": sum(pair[1] for pair in judged) / len(judged) if judged else None,
        "mean_reference_score": sum(pair[0] for pair in judged) / len(judged) if judged else None,
        "not_judged": pairs.count(None),
    }
    return Scored(Tally(items), "the judge's scores of the answers by those of the reference answers", measures)


def ratio_of(tally: Tally) -> dict[str, float]:
    """A category's row; one in which nothing was judged has a score of 0."""
    return {"accuracy": tally.score if math.isfinite(tally.score) else 0.0, "total": len(tally.items)}


def llava_bench(root: Path, split: str | None) -> Benchmark:
    """llava-bench-in-the-wild/ holds questions.jsonl, context.jsonl (captions), answers_gpt4.jsonl (the reference
    answers) and images/."""
    layout = Layout("llava-bench", root / "llava-bench-in-the-wild")
    split = layout.split(split, ("in-the-wild",))
    file, captions = layout.file("questions.jsonl"), layout.file("context.jsonl")
    references = layout.file("answers_gpt4.jsonl")

    def questions() -> list[Question]:
        caption = {text_of(row, "image", where): text_of(row, "caption", where) for row, where in lines_of(captions)}
        answer = {
            value_of(row, "question_id", where): text_of(row, "text", where) for row, where in lines_of(references)
        }
        found = layout.questions(file.name, "images")
        for question in found:
            if question.id not in answer or question.cluster not in caption:
                raise UserError(f"{references} or {captions} lacks question {question.id} or {question.cluster}.")
        return [replace(q, answer=answer[q.id], notes={"caption": caption[q.cluster]}) for q in found]

    return Benchmark(
        name="llava-bench",
        split=split,
        source=f"LLaVA-Bench (in the wild), {file}",
        questions=questions,
        max_new_tokens=TOKENS,
        score=score_llava_bench,
        review=ask_for_two_scores,
    )


def ask_for_two_scores(question: Question, said: str) -> str:
    """What the judge of LLaVA-Bench is asked."""
    return (
        "You grade two assistants that answered a question about an image. You cannot see it; this is what it shows:\n"
        f"[Image]\n{question.notes['caption']}\n\n[Question]\n{question.text}\n\n"
        f"[Assistant 1]\n{question.answer}\n\n[Assistant 2]\n{said}\n\n"
        "Give each answer a score from 1 to 10 for how helpful, relevant, accurate and detailed it is. The first line "
        "of your reply holds the two numbers alone, that of Assistant 1 first, with a space between them. Explain them "
        "in the lines that follow; do not let the order of the answers sway you."
    )


def one_score(said: str | None) -> float | None:
    """The score from 0 to 1 that a judge's reply begins with or consists of; None where there is none."""
    found = NUMBER.findall((said or "").strip().split("\n")[0])
    return float(found[0]) if len(found) == 1 and float(found[0]) <= 1 else None


def score_mm_vet(questions: Sequence[Question], verdicts: Answers) -> Scored:
    """The mean of the judge's scores from 0 to 1 (arXiv:2308.02490), overall, by capability (a question counts in each
    that it needs) and by combination of capabilities. Verdicts without a score are left out, and counted."""
    grades = [one_score(verdict) for verdict in verdicts]
    items = [
        Item(str(q.id), q.cluster, (0.0, 0.0) if grade is None else (grade, 1.0))
        for q, grade in zip(questions, grades, strict=True)
    ]
    judged = [(question, grade) for question, grade in zip(questions, grades, strict=True) if grade is not None]
    each = [(name, grade) for question, grade in judged for name in question.notes["capability"]]
    measures = {
        "by_category": shares([name for name, _ in each], [grade for _, grade in each]),
        "by_combination": shares([question.category for question, _ in judged], [grade for _, grade in judged]),
        "not_judged": grades.count(None),
    }
    return Scored(Tally(items), "the judge's mean score, from 0 to 1", measures)


def mm_vet(root: Path, split: str | None) -> Benchmark:
    """mm-vet/ holds llava-mm-vet.jsonl, mm-vet.json (the right answers and capabilities) and images/."""
    layout = Layout("mm-vet", root / "mm-vet")
    split = layout.split(split, ("v1",))
    file, truth = layout.file("llava-mm-vet.jsonl"), layout.file("mm-vet.json")

    def questions() -> list[Question]:
        known, found = json_of(truth, dict), []
        for question in layout.questions(file.name, "images"):
            key = f"v1_{question.id}"
            if key not in known:
                raise UserError(f"{truth} has no {key}, which {file} asks.")
            needs = sorted(map(str, value_of(known[key], "capability", f"{truth}, {key}")))
            answer = text_of(known[key], "answer", f"{truth}, {key}")
            found.append(replace(question, answer=answer, category=", ".join(needs), notes={"capability": needs}))
        return found

    return Benchmark(
        name="mm-vet",
        split=split,
        source=f"MM-Vet, {file}",
        questions=questions,
        max_new_tokens=TOKENS,
        score=score_mm_vet,
        submissions=[Submission("mm-vet_results.json", write_results)],
        review=ask_for_one_score,
    )


def ask_for_one_score(question: Question, said: str) -> str:
    """What the judge of MM-Vet is asked."""
    return (
        "Grade an answer to a question about an image by comparing it with the right answer. Where the right answer "
        "has <AND> between parts, all of them are needed; where it has <OR>, any of them is enough.\n\n"
        f"[Question]\n{question.text}\n\n[Right answer]\n{question.answer}\n\n[Answer]\n{said}\n\n"
        "Reply with one number alone, from 0.0 (wrong) to 1.0 (right) in steps of 0.1: how much of it is right."
    )


def write_results(path: Path, questions: Sequence[Question], answers: Answers) -> None:
    """What MM-Vet's own grader takes: {'v1_0': answer, …}."""
    write_json(path, {f"v1_{question.id}": said or "" for question, said in zip(questions, answers, strict=True)})


BENCHMARKS["llava-bench"] = llava_bench
BENCHMARKS["mm-vet"] = mm_vet
