# SPDX-License-Identifier: Apache-2.0
"""ScienceQA (arXiv:2209.09513): multiple choice, half of it without an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moellava.constants import DEFAULT_IMAGE_TOKEN
from moellava.errors import UserError
from moellava.eval.benchmarks import BENCHMARKS, LETTER, Answers, Benchmark, Question, Scored
from moellava.eval.choices import LETTERS, scienceqa_letter
from moellava.eval.layout import Layout, Row, json_of, rows_of, text_of, value_of
from moellava.eval.tally import Item, Tally, shares

TOKENS = 1024
"""As LLaVA's script: answers may explain themselves."""

SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}


def score_scienceqa(questions: Sequence[Question], answers: Answers) -> Scored:
    """Accuracy, and as the paper's table has it: by subject (NAT, SOC, LAN), by what comes with the question (TXT: a
    hint; IMG: an image; NO: neither; a question with both counts in two), and by grade (G1-6, G7-12).

    A question's `answer` is its row of problems.json. An answer in which no option is found is wrong.
    """
    right = []
    for question, said in zip(questions, answers, strict=True):
        letters = LETTERS[: len(question.answer["choices"])]
        letter = None if said is None else scienceqa_letter(said.strip(), letters)
        right.append(letter is not None and letters.index(letter) == question.answer["answer"])
    items = [Item(str(q.id), q.cluster, (float(hit), 1.0)) for q, hit in zip(questions, right, strict=True)]
    parts = [(part, hit) for q, hit in zip(questions, right, strict=True) for part in parts_of(q.answer)]
    measures = {
        "by_category": shares([part for part, _ in parts], [hit for _, hit in parts]),
        "image_accuracy": _mean([hit for q, hit in zip(questions, right, strict=True) if q.image is not None]),
    }
    return Scored(Tally(items), "accuracy", measures, right)


def _mean(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def parts_of(problem: Row) -> list[str]:
    """The columns of the paper's table that a problem counts in."""
    subject = SUBJECTS.get(problem.get("subject", ""), "other")
    hint, image = problem.get("hint"), problem.get("image")
    modality = [name for name, has in (("TXT", hint), ("IMG", image), ("NO", not hint and not image)) if has]
    grade = int(str(problem.get("grade", "grade0")).removeprefix("grade"))
    return [subject, *modality, "G1-6" if grade <= 6 else "G7-12"]


def scienceqa(root: Path, split: str | None) -> Benchmark:
    """scienceqa/ holds llava_test_CQM-A.json, problems.json, pid_splits.json and the images in images/test/."""
    layout = Layout("scienceqa", root / "scienceqa")
    split = layout.split(split, ("test", "val"))
    file, problems = layout.file(f"llava_{split}_CQM-A.json"), layout.file("problems.json")
    splits = layout.file("pid_splits.json")

    def questions() -> list[Question]:
        known, wanted = json_of(problems, dict), json_of(splits, dict)
        asked = {}
        for row, where in rows_of(json_of(file, list), file):
            number = str(value_of(row, "id", where))
            if number not in known:
                raise UserError(f"{where}: {problems} has no problem {number}.")
            turns = value_of(row, "conversations", where)
            text = text_of(turns[0] if turns else {}, "value", where).replace(DEFAULT_IMAGE_TOKEN, "").strip()
            asked[number] = Question(
                text=f"{text}\n{LETTER}",
                answer=known[number],
                image=layout.folder / "images" / split / row["image"] if row.get("image") else None,
                category="default",
                id=number,
                about=f"problem {number}",  # images are all called image.png
            )
        missing = [number for number in map(str, wanted.get(split, ())) if number not in asked]
        if missing:
            raise UserError(f"{file} has no question about {len(missing)} problems of {splits}, such as {missing[0]}.")
        return list(asked.values())

    return Benchmark(
        name="scienceqa",
        split=split,
        source=f"ScienceQA, {file}",
        questions=questions,
        max_new_tokens=TOKENS,
        score=score_scienceqa,
    )


BENCHMARKS["scienceqa"] = scienceqa
