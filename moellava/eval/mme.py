# SPDX-License-Identifier: Apache-2.0
"""MME (arXiv:2306.13394): two questions about each image, one with 'yes' and one with 'no'; 14 subtasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from moellava.errors import UserError
from moellava.eval.benchmarks import BENCHMARKS, SINGLE_WORD, Answers, Benchmark, Question, Scored, Submission
from moellava.eval.layout import Layout
from moellava.eval.tally import Item, Tally, mme_points
from moellava.eval.vqa import TOKENS

RELEASE = "MME_Benchmark_release_version"

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def yes_or_no(said: str | None) -> str | None:
    """What an answer says, by MME's own `calculation.py`: it is, or its first four letters hold, 'yes' or 'no'."""
    heard = (said or "").strip().lower()
    return next((word for word in ("yes", "no") if word in heard[:4]), None)


def score_mme(questions: Sequence[Question], answers: Answers) -> Scored:
    """Points: the sum over subtasks of 100 × accuracy (share of right answers) and 100 × accuracy+ (share of images
    with both answers right); 2,800 at most. Perception and cognition apart, too: 2,000 and 800.

    A question's `answer` is 'yes' or 'no', its category the subtask, its unit the image.
    """
    right = [
        question.answer is not None and yes_or_no(said) == question.answer
        for question, said in zip(questions, answers, strict=True)
    ]
    both: dict[str, bool] = {}
    for question, hit in zip(questions, right, strict=True):
        both[question.unit] = both.get(question.unit, True) and hit
    items, seen = [], set[str]()
    for question, hit in zip(questions, right, strict=True):
        first = question.unit not in seen
        seen.add(question.unit)
        adds = (float(hit), 1.0, float(first and both[question.unit]), float(first))
        items.append(Item(str(question.id), question.unit, adds, question.category))
    tally = Tally(items, "mme")
    subtasks = {name: subtask_measures(items, name) for name in sorted({item.group for item in items})}
    points = {name: found["score"] for name, found in subtasks.items()}
    measures = {
        "perception": sum(points.get(name, 0.0) for name in PERCEPTION),
        "cognition": sum(points.get(name, 0.0) for name in COGNITION),
        "subtasks": subtasks,
    }
    return Scored(tally, "points: 100 × accuracy + 100 × accuracy+ of each subtask", measures, right)


def subtask_measures(items: Sequence[Item], name: str) -> dict[str, float]:
    """The numbers of one subtask; accuracies as shares."""
    sums = Tally([item for item in items if item.group == name]).sums()[0].sum(axis=0)
    right, asked, both, images = sums.tolist()
    points = float(mme_points(sums))
    return {"score": points, "accuracy": right / asked, "accuracy_plus": both / images, "total": int(asked)}


def mme(root: Path, split: str | None) -> Benchmark:
    """MME/ holds llava_mme.jsonl and MME_Benchmark_release_version/ as MME publishes it: a folder a subtask, with an
    image and a text file of its questions and answers each, or these in images/ and questions_answers_YN/."""
    layout = Layout("mme", root / "MME")
    split = layout.split(split, ("test",))
    file, release = layout.file("llava_mme.jsonl"), layout.folder / RELEASE

    def questions() -> list[Question]:
        return [answered(question, release) for question in layout.questions(file.name, RELEASE)]

    return Benchmark(
        name="mme",
        split=split,
        source=f"MME, {file}",
        questions=questions,
        max_new_tokens=TOKENS,
        score=score_mme,
        submissions=[Submission("mme_results", write_results)],
    )


def answered(question: Question, release: Path) -> Question:
    """A question with its right answer and its image. Raises UserError where MME's files have none."""
    subtask, name = str(question.id).split("/")[0], Path(str(question.id)).name
    folder = release / subtask
    stem = Path(name).stem
    texts = [folder / f"{stem}.txt", folder / "questions_answers_YN" / f"{stem}.txt"]
    text = next((path for path in texts if path.is_file()), None)
    if text is None:
        raise UserError(f"--task mme: there is no {texts[0]}, nor {texts[1]}, with the answers about {question.id}.")
    asked = words_of(question.text)
    answer = answers_in(text).get(asked)
    if answer not in ("yes", "no"):
        raise UserError(f"{text} has no answer, yes or no, to {asked!r}.")
    images = [Path(str(question.image)), folder / "images" / name]
    image = next((path for path in images if path.is_file()), images[0])
    return replace(
        question, answer=answer, category=subtask, image=image, about=f"{subtask}/{stem}", unit=f"{subtask}/{stem}"
    )


def words_of(prompt: str) -> str:
    """A question as MME's files have it: without LLaVA's instruction, white space aside."""
    return " ".join(prompt.replace(SINGLE_WORD, "").split())


def answers_in(path: Path) -> Mapping[str, str]:
    """Question -> answer in lower case, of a file of MME: a line each, a tab between them."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = (line.rpartition("\t") for line in lines if line.strip())
    return {" ".join(question.split()): answer.strip().lower() for question, _, answer in pairs}


def write_results(folder: Path, questions: Sequence[Question], answers: Answers) -> None:
    """A file a subtask for MME's `calculation.py`: image, question, right answer, answer, with tabs between them."""
    folder.mkdir(exist_ok=True)
    lines: dict[str, list[str]] = {}
    for question, said in zip(questions, answers, strict=True):
        fields = (Path(str(question.id)).name, words_of(question.text), question.answer.capitalize(), said or "")
        lines.setdefault(question.category, []).append("\t".join(" ".join(field.split()) for field in fields))
    for subtask, rows in lines.items():
        (folder / f"{subtask}.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")


BENCHMARKS["mme"] = mme
