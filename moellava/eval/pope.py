# SPDX-License-Identifier: Apache-2.0
"""POPE (arXiv:2305.10355): is there such an object in the image? In three splits, by which objects are asked about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moellava.errors import UserError
from moellava.eval.benchmarks import BENCHMARKS, Answers, Benchmark, Question, Scored
from moellava.eval.layout import Layout, lines_of, text_of, value_of
from moellava.eval.tally import Item, Tally
from moellava.eval.vqa import TOKENS

SPLITS = ("adversarial", "popular", "random")

DENIALS = {"No", "no", "not"}
"""Words by which POPE's script knows a 'no'; whatever else is said is a 'yes'."""


def yes_or_no(said: str | None) -> str | None:
    """What an answer's first sentence says, by POPE's own rule; None where nothing is said."""
    if said is None or not said.strip():
        return None
    words = said.split(".")[0].replace(",", "").split(" ")
    return "no" if DENIALS.intersection(words) else "yes"


def score_pope(questions: Sequence[Question], answers: Answers) -> Scored:
    """F1, the mean over the splits, with 'yes' as what is looked for; per split accuracy, precision, recall, F1 and the
    share of 'yes'. Where nothing is said, that is the wrong answer.

    Precision = tp / (tp + fp), recall = tp / (tp + fn), F1 = 2 · precision · recall / (precision + recall),
    accuracy = (tp + tn) / all. A question's `answer` is 'yes' or 'no'.
    """
    counts: dict[str, Counter[str]] = {}
    items, right = [], []
    for question, said in zip(questions, answers, strict=True):
        heard, wanted = yes_or_no(said), question.answer
        hit = heard == wanted
        outcome = ("tp" if hit else "fn") if wanted == "yes" else ("tn" if hit else "fp")
        counts.setdefault(question.category, Counter()).update([outcome, *(["said yes"] if heard == "yes" else [])])
        adds = tuple(float(outcome == name) for name in ("tp", "fp", "fn"))
        items.append(Item(str(question.id), question.cluster, adds, question.category))
        right.append(hit)
    measures = {"splits": {name: split_measures(counts[name]) for name in sorted(counts)}}
    return Scored(Tally(items, "f1"), "F1, mean over the splits", measures, right)


def split_measures(count: Counter[str]) -> dict[str, float]:
    """The five numbers of one split; 0 where nothing is divided by."""
    tp, fp, fn, tn = (count[name] for name in ("tp", "fp", "fn", "tn"))
    total = tp + fp + fn + tn
    precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
    return {
        "accuracy": (tp + tn) / total,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if tp else 0.0,
        "yes_ratio": count["said yes"] / total,
        "total": total,
    }


def pope(root: Path, split: str | None) -> Benchmark:
    """pope/ holds llava_pope_test.jsonl, whose categories are the splits; POPE's own coco_pope_{split}.json in coco/,
    with a label for each question of that split, in the same order; and the images in val2014/."""
    layout = Layout("pope", root / "pope")
    split = layout.split(split, ("test",))
    file = layout.file("llava_pope_test.jsonl")
    truths = {name: layout.file(f"coco/coco_pope_{name}.json") for name in SPLITS}

    def questions() -> list[Question]:
        found, labels = layout.questions(file.name, "val2014"), {name: list(lines_of(truths[name])) for name in SPLITS}
        seen: Counter[str] = Counter()
        labelled = []
        for question in found:
            if question.category not in labels:
                raise UserError(
                    f"{file}, question {question.id}: its category is {question.category}, no split of POPE."
                )
            place = seen[question.category]
            seen[question.category] += 1
            if place < len(labels[question.category]):
                labelled.append(labelled_by(question, *labels[question.category][place]))
        if any(seen[name] != len(labels[name]) for name in SPLITS):
            counted = ", ".join(f"{name} {seen[name]} and {len(labels[name])}" for name in SPLITS)
            raise UserError(
                f"{file} and the labels in {layout.folder / 'coco'} have other numbers of questions: {counted}"
            )
        return labelled

    return Benchmark(
        name="pope",
        split=split,
        source=f"POPE (COCO), {file}",
        questions=questions,
        max_new_tokens=TOKENS,
        score=score_pope,
    )


def labelled_by(question: Question, row: dict, where: str) -> Question:
    """A question with its label. Raises UserError where the label is another question's, or no label."""
    asked, label = text_of(row, "text", where), str(value_of(row, "label", where)).lower()
    if question.text.split("\n")[0].strip() != asked.strip() or question.cluster != text_of(row, "image", where):
        raise UserError(
            f"{where} labels {asked!r} about {row['image']}, but LLaVA's file asks {question.text!r} there."
        )
    if label not in ("yes", "no"):
        raise UserError(f"{where}: 'label' has to be yes or no, and is {label!r}.")
    return replace(question, answer=label)


BENCHMARKS["pope"] = pope
