# SPDX-License-Identifier: Apache-2.0
"""A result as a few lines for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moellava.eval.tally import STATISTICS

TABLES = ("by_category", "splits", "subtasks", "by_data_type")
"""Measures that are tables: name -> numbers by name."""

COUNTS = ("perception", "cognition", "vanilla", "image_accuracy", "mean_score", "not_judged")
"""Measures that are one number, and are told."""

POINTS = ("perception", "cognition", "score", "mean_score")
"""Numbers that are no shares of 1."""


def summary(result: Mapping[str, Any], files: Sequence[str] = ()) -> str:
    """The score with its interval, its parts, and what could not be answered.

    Args:
        result: of `scoring.report`, and `seconds`.
        files: what was written.
    """
    shuffled = ", images shuffled between questions" if result["settings"]["shuffle_images"] else ""
    head = f"{result['benchmark']} ({result['split']} split{shuffled})"
    asked = f"{result['questions']} questions"
    if "score" in result:
        lines = [f"{head}: {score_line(result)}, {result['seconds']:.0f} s"]
    else:
        lines = [f"{head}: {asked} answered, not scored here, {result['seconds']:.0f} s"]
    for table in TABLES:
        lines += [row_line(name, numbers) for name, numbers in result.get(table, {}).items()]
    lines += [f"  {name.replace('_', ' ')} {number(name, result[name])}" for name in COUNTS if result.get(name)]
    if "against" in result:
        lines.append(against_line(result))
    if result["unanswered"]:
        lines.append(f"  {len(result['unanswered'])} questions could not be answered, and count as wrong")
    return "\n".join([*lines, *(f"  written: {file}" for file in files)])


def score_line(result: Mapping[str, Any]) -> str:
    """'98.63% of 9673 questions (95% interval 98.38 to 98.87)'."""
    if result["score"] is None:
        return f"no score of {result['questions']} questions"
    statistic = STATISTICS[result["statistic"]]
    shown = f"{result['score']:.1f} points" if statistic.points else f"{100 * result['score']:.2f}%"
    scale = statistic.scale
    interval = result["interval"]
    sure = f" (95% interval {scale * interval[0]:.2f} to {scale * interval[1]:.2f})" if interval else ""
    return f"{shown} of {result['questions']} questions{sure}"


def row_line(name: str, numbers: Mapping[str, float]) -> str:
    """A row of a table; of shares alone the first is told as '  name  98.63% of 1257'."""
    if set(numbers) == {"accuracy", "total"}:
        return f"  {name:8} {100 * numbers['accuracy']:6.2f}% of {numbers['total']}"
    parts = [f"{key} {number(key, value)}" for key, value in numbers.items() if key != "total"]
    return f"  {name:22} {'  '.join(parts)}  of {numbers['total']}"


def number(name: str, value: float) -> str:
    """A number as it is told."""
    if isinstance(value, int):
        return str(value)
    return f"{value:.1f}" if name in POINTS else f"{100 * value:.2f}%"


def against_line(result: Mapping[str, Any]) -> str:
    """'+0.55 (95% interval -0.12 to 1.22) against 98.08 of runs/stage2'."""
    other = result["against"]
    scale = STATISTICS[result["statistic"]].scale
    interval = other["interval"]
    sure = f" (95% interval {scale * interval[0]:+.2f} to {scale * interval[1]:+.2f})" if interval else ""
    before = f"{scale * other['score']:.2f} of {other['model_path']}"
    return f"  {scale * other['difference']:+.2f} points{sure} against {before}"
