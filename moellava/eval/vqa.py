# SPDX-License-Identifier: Apache-2.0
"""Benchmarks that are scored by VQA's soft accuracy: VQAv2, VizWiz and TextVQA."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moellava.errors import UserError
from moellava.eval.benchmarks import BENCHMARKS, SINGLE_WORD, Answers, Benchmark, Question, Scored, Submission
from moellava.eval.layout import Layout, Row, json_of, lines_of, rows_of, text_of, value_of
from moellava.eval.tally import Item, Tally, shares
from moellava.eval.vqa_text import evalai, textvqa_accuracy, vqa_accuracy
from moellava.files import written

TOKENS = 128
"""As LLaVA's scripts for short answers."""

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
"""LLaVA's line for VizWiz, whose questions were asked by blind people."""

OCR_LINE = "Reference OCR token:"
"""How LLaVA's file for TextVQA begins the line that follows a question, or stands before it."""


def score_vqa(questions: Sequence[Question], answers: Answers) -> Scored:
    """VQA's soft accuracy (arXiv:1505.00468): the mean over people of min(1, others who say the same / 3).

    A question's `answer` is the list of what people said; a missing answer counts as one that nobody gave.
    """
    return _soft(questions, answers, vqa_accuracy, "VQA accuracy, official processing")


def score_textvqa(questions: Sequence[Question], answers: Answers) -> Scored:
    """The same with EvalAI's processing, as TextVQA's evaluator has it (arXiv:1904.08920)."""
    return _soft(questions, answers, textvqa_accuracy, "VQA accuracy, EvalAI's processing")


def _soft(
    questions: Sequence[Question], answers: Answers, accuracy: Callable[[str, Sequence[str]], float], metric: str
) -> Scored:
    asked = zip(questions, answers, strict=True)
    values = [0.0 if said is None else accuracy(said, question.answer) for question, said in asked]
    items = [Item(str(q.id), q.cluster, (value, 1.0)) for q, value in zip(questions, values, strict=True)]
    measures = {"by_category": shares([question.category for question in questions], values)}
    return Scored(Tally(items), metric, measures, [value >= 0.5 for value in values])


def people_of(row: Row, where: str) -> list[str]:
    """What people said, of a row of annotations."""
    return [text_of(one, "answer", where) for one in value_of(row, "answers", where)]


def _write(path: Path, content: Any) -> None:
    """Compact JSON, as the servers take it."""
    with written(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


def vqav2(root: Path, split: str | None) -> Benchmark:
    """VQAv2 (arXiv:1612.00837): the test splits are scored by EvalAI; val2014 here, with its annotations.

    vqav2/ holds llava_vqav2_mscoco_{split}.jsonl, or v2_OpenEnded_mscoco_{split}_questions.json in its place; the
    images in test2015/ or val2014/; and v2_mscoco_val2014_annotations.json.
    """
    layout = Layout("vqav2", root / "vqav2")
    split = layout.split(split, ("test-dev2015", "test2015", "val2014"))
    images, is_scored = split.replace("-dev", ""), split == "val2014"
    names = (f"llava_vqav2_mscoco_{split}.jsonl", f"v2_OpenEnded_mscoco_{split}_questions.json")

    def question_of(row: Row, where: str) -> Question:
        image = f"COCO_{images}_{int(value_of(row, 'image_id', where)):012d}.jpg"
        text = f"{text_of(row, 'question', where)}\n{SINGLE_WORD}"
        return Question(text, None, layout.folder / images / image, "default", value_of(row, "question_id", where))

    def questions() -> list[Question]:
        file = layout.file(*names)
        if file.name == names[0]:
            found = layout.questions(file.name, images)
        else:
            found = [question_of(row, where) for row, where in rows_of(json_of(file, dict).get("questions"), file)]
        return annotated(found, layout.file(f"v2_mscoco_{split}_annotations.json")) if is_scored else found

    def write(path: Path, questions: Sequence[Question], answers: Answers) -> None:
        """Every question of the test set, as EvalAI wants it; what was not asked has an empty answer."""
        said = {q.id: evalai(text or "") for q, text in zip(questions, answers, strict=True)}
        whole = layout.optional("llava_vqav2_mscoco_test2015.jsonl") if split == "test-dev2015" else None
        listed = [] if whole is None else [value_of(row, "question_id", where) for row, where in lines_of(whole)]
        _write(path, [{"question_id": number, "answer": said.get(number, "")} for number in listed or said])

    return Benchmark(
        name="vqav2",
        split=split,
        source=f"VQAv2, {layout.file(*names)}",
        questions=questions,
        max_new_tokens=TOKENS,
        score=score_vqa if is_scored else None,
        submissions=[Submission("vqav2_submission.json", write)],
    )


def annotated(questions: Sequence[Question], path: Path) -> list[Question]:
    """The same questions with what people said, and the type of that as the category. Raises UserError for a question
    that the annotations lack."""
    rows = rows_of(json_of(path, dict).get("annotations"), path)
    known = {value_of(row, "question_id", where): (row, where) for row, where in rows}
    if unknown := [question.id for question in questions if question.id not in known]:
        raise UserError(f"{path} has no annotation of {len(unknown)} questions, such as question_id {unknown[0]}.")
    return [
        replace(question, answer=people_of(row, where), category=str(row.get("answer_type", "default")))
        for question in questions
        for row, where in [known[question.id]]
    ]


def vizwiz(root: Path, split: str | None) -> Benchmark:
    """VizWiz-VQA (arXiv:1802.08218): the test split is scored by EvalAI; val here, with what people said.

    vizwiz/ holds llava_test.jsonl, or test.json or val.json as VizWiz publishes it; the images in test/ or val/.
    """
    layout = Layout("vizwiz", root / "vizwiz")
    split = layout.split(split, ("test", "val"))
    is_scored = split == "val"
    file = layout.file(f"{split}.json") if is_scored else layout.file("llava_test.jsonl", "test.json")

    def question_of(row: Row, where: str) -> Question:
        image = text_of(row, "image", where)
        return Question(
            text=f"{text_of(row, 'question', where)}\n{UNANSWERABLE}\n{SINGLE_WORD}",
            answer=people_of(row, where) if is_scored else None,
            image=layout.folder / split / image,
            category=str(row.get("answer_type", "default")),
            id=image,
        )

    def questions() -> list[Question]:
        if file.suffix == ".jsonl":
            return layout.questions(file.name, split)
        return [question_of(row, where) for row, where in rows_of(json_of(file, list), file)]

    def write(path: Path, questions: Sequence[Question], answers: Answers) -> None:
        said = zip(questions, answers, strict=True)
        _write(path, [{"image": question.cluster, "answer": evalai(text or "")} for question, text in said])

    return Benchmark(
        name="vizwiz",
        split=split,
        source=f"VizWiz-VQA, {file}",
        questions=questions,
        max_new_tokens=TOKENS,
        score=score_vqa if is_scored else None,
        submissions=[Submission("vizwiz_submission.json", write)],
    )


def textvqa(root: Path, split: str | None) -> Benchmark:
    """TextVQA's validation split (arXiv:1904.08920).

    textvqa/ holds llava_textvqa_val_v051_ocr.jsonl, TextVQA_0.5.1_val.json and the images in train_images/. A
    `question_id` of LLaVA's file is an image's name: a question is found by that and its words.
    """
    layout = Layout("textvqa", root / "textvqa")
    split = layout.split(split, ("val",))
    file, annotations = layout.file("llava_textvqa_val_v051_ocr.jsonl"), layout.file("TextVQA_0.5.1_val.json")

    def questions() -> list[Question]:
        known = {
            (str(value_of(row, "image_id", where)), text_of(row, "question", where).lower()): (row, where)
            for row, where in rows_of(json_of(annotations, dict).get("data"), annotations)
        }
        found = []
        for question in layout.questions(file.name, "train_images"):
            key = (str(question.id), words_of(question.text).lower())
            if key not in known:
                raise UserError(f"{annotations} has no question {key[1]!r} about the image {key[0]}.")
            row, where = known[key]
            people = [str(said) for said in value_of(row, "answers", where)]
            found.append(replace(question, answer=people, id=str(row.get("question_id", question.id))))
        return found

    return Benchmark(
        name="textvqa",
        split=split,
        source=f"TextVQA 0.5.1, {file}",
        questions=questions,
        max_new_tokens=TOKENS,
        score=score_textvqa,
    )


def words_of(prompt: str) -> str:
    """The question of a prompt of LLaVA's file for TextVQA, without OCR tokens and instruction.

    Examples:
        'what is it?\\nReference OCR token: A, B\\nAnswer the question …' -> 'what is it?'
    """
    return next((line for line in prompt.split("\n") if not line.startswith(OCR_LINE)), "")


BENCHMARKS["vqav2"] = vqav2
BENCHMARKS["vizwiz"] = vizwiz
BENCHMARKS["textvqa"] = textvqa
