# SPDX-License-Identifier: Apache-2.0
"""The result of a benchmark: a score, how sure it is, and all that is needed to take it again."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moellava.errors import UserError
from moellava.eval.asking import Said, request_of
from moellava.eval.benchmarks import Benchmark, Question, Scored
from moellava.eval.layout import json_of
from moellava.eval.tally import FORMULA, STATISTICS, WITHIN, Item, Tally
from moellava.files import file_problem, written
from moellava.vlm import VLM

MISTAKES_SHOWN = 20
REPORTED_PACKAGES = ("moellava", "torch", "transformers", "tokenizers", "pillow")

RESULT = "result.json"
"""A result in the folder of its task."""

ITEMS = "items"
"""The last entry of a result: what each question adds to the score, a line each."""


def texts_of(said: Sequence[Said]) -> list[str | None]:
    """The answers; None where there is none."""
    return [one.text for one in said]


def report(
    benchmark: Benchmark,
    questions: Sequence[Question],
    said: Sequence[Said],
    scored: Scored | None,
    *,
    vlm: VLM,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """A result: score and interval, the scorer's other numbers, prompt, decoding, versions, and the first mistakes.

    Args:
        benchmark: what was asked.
        questions, said: its questions, and the answers.
        scored: None where it is not scored here.
        vlm: the model that answered.
        settings: what decides the score beside the benchmark: flags, and the hash of the model.
    """
    unanswered = [(q, one.error) for q, one in zip(questions, said, strict=True) if one.error is not None]
    found: dict[str, Any] = {"benchmark": benchmark.name, "split": benchmark.split}
    if scored is not None:
        score, interval = scored.tally.score, scored.tally.interval()
        found |= {"score": score if math.isfinite(score) else None, "metric": scored.metric}
        found |= {"interval": interval and list(interval), "interval_is": WITHIN}
        found |= accuracy_of(scored) | scored.measures
    return {
        **found,
        "questions": len(questions),
        "unanswered": [{"question": q.text, "image": q.cluster, "error": error} for q, error in unanswered],
        "prompt": {"version": vlm.encoder.version, "example": prompt_of(vlm, questions[0]) if questions else ""},
        "settings": {"decoding": "greedy", **settings},
        "versions": versions(benchmark),
        "mistakes": [] if scored is None else mistakes(questions, said, scored),
        **({} if scored is None else items_of(scored.tally)),
    }


def accuracy_of(scored: Scored) -> dict[str, Any]:
    """The share of wholly right answers, where an answer is right or wrong."""
    if scored.right is None:
        return {}
    right = sum(scored.right)
    return {"accuracy": right / len(scored.right) if scored.right else 0.0, "right": right}


def mistakes(questions: Sequence[Question], said: Sequence[Said], scored: Scored) -> list[dict[str, Any]]:
    """The first wrong answers."""
    asked = zip(questions, said, scored.right or [True] * len(questions), strict=True)
    wrong = [(question, one.text) for question, one, right in asked if not right]
    return [
        {"question": q.text, "image": q.cluster, "expected": q.answer, "answered": text}
        for q, text in wrong[:MISTAKES_SHOWN]
    ]


def prompt_of(vlm: VLM, question: Question) -> str:
    """The first prompt in full, with the model's template."""
    return "".join(piece.text for piece in vlm.encoder.pieces(request_of(question).record, opens=True))


def versions(benchmark: Benchmark) -> dict[str, str]:
    """What ran: Python, the packages that shape an answer, and the benchmark's own source."""
    packages = {name: version(name) for name in REPORTED_PACKAGES}
    return {"python": platform.python_version(), **packages, "data": benchmark.source}


def items_of(tally: Tally) -> dict[str, Any]:
    """A tally as it is written into a result."""
    rows = [{"id": item.id, "image": item.image, "group": item.group, "adds": list(item.adds)} for item in tally.items]
    return {"statistic": tally.statistic, ITEMS: rows}


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result as JSON, its items one a line."""
    items = result.get(ITEMS)
    head = json.dumps({name: value for name, value in result.items() if name != ITEMS}, indent=2)
    with written(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        if items is None:
            file.write(head + "\n")
            return
        lines = ",\n".join(f"    {json.dumps(item)}" for item in items)
        file.write(f'{head.removesuffix("}").rstrip()},\n  "{ITEMS}": [\n{lines}\n  ]\n}}\n')


def read_tally(path: Path, name: str) -> tuple[Tally, dict[str, Any]]:
    """The tally of a result, and the result. Raises UserError where there is none of that benchmark."""
    if problem := file_problem(path):
        raise UserError(f"--against {path}: {problem}")
    result = json_of(path, dict)
    if result.get("benchmark") != name or not isinstance(result.get(ITEMS), list):
        what = f"a result of {result['benchmark']}" if result.get("benchmark") else "no result of `moellava eval`"
        raise UserError(f"--against {path}: {what}, where one of {name} with its {ITEMS} is needed.")
    try:
        items = [Item(row["id"], row["image"], tuple(row["adds"]), row["group"]) for row in result[ITEMS]]
        _ = STATISTICS[result["statistic"]]
        return Tally(items, result["statistic"]), result
    except (KeyError, TypeError) as error:
        raise UserError(f"--against {path}: its {ITEMS} are damaged: {error!r}") from error


def against(tally: Tally, path: Path, name: str) -> dict[str, Any]:
    """A score less that of another result on the same questions, with the interval of the difference.

    Raises:
        UserError: the file is no such result.
    """
    other, result = read_tally(path, name)
    difference, interval = tally.minus(other)
    return {
        "result": str(path),
        "model_path": result.get("settings", {}).get("model_path"),
        "score": other.score,
        "difference": difference,
        "interval": interval and list(interval),
        "interval_is": f"{FORMULA}, from both scores at once",
    }
