# SPDX-License-Identifier: Apache-2.0
"""GQA (arXiv:1902.09506): compositional questions with one right word each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moellava.errors import UserError
from moellava.eval.benchmarks import BENCHMARKS, Answers, Benchmark, Question, Scored, Submission
from moellava.eval.layout import Layout, json_of, text_of, value_of
from moellava.eval.tally import Item, Tally, shares
from moellava.eval.vqa import TOKENS
from moellava.files import written

OPEN = "query"
"""The structural type whose questions are open; all others are binary."""


def prediction(said: str) -> str:
    """An answer as LLaVA hands it to GQA's script: lower case, without a period at its end."""
    return said.strip().rstrip(".").lower()


def score_gqa(questions: Sequence[Question], answers: Answers) -> Scored:
    """Accuracy: the right word exactly. By binary and open questions, and by structural and semantic type, as GQA's
    `eval.py` has it. (Its consistency, validity, plausibility and distribution need its scene graphs.)

    A question's `answer` is the right word; its notes hold the types.
    """
    right = [
        said is not None and prediction(said) == question.answer
        for question, said in zip(questions, answers, strict=True)
    ]
    items = [Item(str(q.id), q.cluster, (float(hit), 1.0)) for q, hit in zip(questions, right, strict=True)]
    measures = {
        "by_category": shares([question.category for question in questions], right),
        "by_structural_type": shares([q.notes["structural"] for q in questions], right),
        "by_semantic_type": shares([q.notes["semantic"] for q in questions], right),
    }
    return Scored(Tally(items), "accuracy: exact match", measures, right)


def gqa(root: Path, split: str | None) -> Benchmark:
    """gqa/ holds llava_gqa_testdev_balanced.jsonl; data/ below it the images in images/, and GQA's own question file
    {split}_questions.json, which has the right answers (also in questions1.2/)."""
    layout = Layout("gqa", root / "gqa")
    split = layout.split(split, ("testdev_balanced", "val_balanced"))
    file = layout.file(f"llava_gqa_{split}.jsonl")
    truth = layout.file(f"data/{split}_questions.json", f"data/questions1.2/{split}_questions.json")

    def questions() -> list[Question]:
        known, found = json_of(truth, dict), []
        for question in layout.questions(file.name, "data/images"):
            number, where = str(question.id), f"{truth}, question {question.id}"
            if number not in known:
                raise UserError(f"{truth} has no question {number}, which {file} asks.")
            types = known[number].get("types") or {}
            structural = str(types.get("structural", "unknown"))
            found.append(
                replace(
                    question,
                    answer=text_of(known[number], "answer", where),
                    category="open" if structural == OPEN else "binary",
                    about=str(value_of(known[number], "imageId", where)),
                    notes={"structural": structural, "semantic": str(types.get("semantic", "unknown"))},
                )
            )
        return found

    def write(path: Path, questions: Sequence[Question], answers: Answers) -> None:
        said = zip(questions, answers, strict=True)
        rows = [{"questionId": str(question.id), "prediction": prediction(text or "")} for question, text in said]
        with written(path) as temporary:
            temporary.write_text(json.dumps(rows), encoding="utf-8")

    return Benchmark(
        name="gqa",
        split=split,
        source=f"GQA, {file}",
        questions=questions,
        max_new_tokens=TOKENS,
        score=score_gqa,
        submissions=[Submission(f"{split}_predictions.json", write)],
    )


BENCHMARKS["gqa"] = gqa
