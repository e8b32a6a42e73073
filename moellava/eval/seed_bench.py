# SPDX-License-Identifier: Apache-2.0
"""SEED-Bench (arXiv:2307.16125): multiple choice about images, and about videos, each shown as its middle frame."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moellava.errors import UserError
from moellava.eval.benchmarks import BENCHMARKS, Answers, Benchmark, Question, Scored, Submission
from moellava.eval.choices import letter_of
from moellava.eval.layout import Layout, json_of, rows_of, text_of, value_of
from moellava.eval.tally import Item, Tally, shares
from moellava.eval.vqa import TOKENS
from moellava.files import written

CHOICES = "ABCD"


def score_seed(questions: Sequence[Question], answers: Answers) -> Scored:
    """Accuracy over all questions; by type of question, and over those about images and about videos.

    A question's `answer` is the right letter; its notes hold the options and 'image' or 'video'.
    """
    right = []
    for question, said in zip(questions, answers, strict=True):
        right.append(said is not None and letter_of(said, question.notes["choices"]) == question.answer)
    items = [Item(str(q.id), q.cluster, (float(hit), 1.0)) for q, hit in zip(questions, right, strict=True)]
    measures = {
        "by_category": shares([question.category for question in questions], right),
        "by_data_type": shares([question.notes["data_type"] for question in questions], right),
    }
    return Scored(Tally(items), "accuracy", measures, right)


def seed_bench(root: Path, split: str | None) -> Benchmark:
    """seed_bench/ holds llava-seed-bench.jsonl, SEED-Bench.json as it is published, and the images in
    SEED-Bench-image/ and SEED-Bench-video-image/ (the middle frames, which LLaVA's script cuts out)."""
    layout = Layout("seed-bench", root / "seed_bench")
    split = layout.split(split, ("test",))
    file, annotations = layout.file("llava-seed-bench.jsonl"), layout.file("SEED-Bench.json")

    def questions() -> list[Question]:
        content, found = json_of(annotations, dict), []
        types = {number: name for name, number in (content.get("question_type") or {}).items()}
        known = {
            str(value_of(row, "question_id", where)): (row, where)
            for row, where in rows_of(content.get("questions"), annotations)
        }
        for question in layout.questions(file.name, ""):
            if str(question.id) not in known:
                raise UserError(f"{annotations} has no question {question.id}, which {file} asks.")
            row, where = known[str(question.id)]
            number = value_of(row, "question_type_id", where)
            choices = {letter: str(row.get(f"choice_{letter.lower()}", "")) for letter in CHOICES}
            data_type = str(row.get("data_type", "image"))
            found.append(
                replace(
                    question,
                    answer=text_of(row, "answer", where),
                    category=types.get(number, f"type {number}"),
                    notes={"choices": choices, "data_type": data_type},
                )
            )
        return found

    return Benchmark(
        name="seed-bench",
        split=split,
        source=f"SEED-Bench, {file}",
        questions=questions,
        max_new_tokens=TOKENS,
        score=score_seed,
        submissions=[Submission("seed_bench_submission.jsonl", write_submission)],
    )


def write_submission(path: Path, questions: Sequence[Question], answers: Answers) -> None:
    """A line a question, as the leaderboard takes them."""
    rows = [{"question_id": q.id, "prediction": said or ""} for q, said in zip(questions, answers, strict=True)]
    with written(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


BENCHMARKS["seed-bench"] = seed_bench
