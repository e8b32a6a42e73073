# SPDX-License-Identifier: Apache-2.0
"""Compares an engine's answers with moellava's own, prints a table, writes JSON; exit status 1 where they differ.

    python scripts/checks/compare.py --title NAME --own OWN.json --theirs ENGINE.json --output FILE [--unlike BASE.json]

Needs nothing installed. What is compared is what the engine tells: texts and lengths, tokens of prompt and answer, and
log probabilities.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from asked import read_answers

EXACT = ("text", "length", "prompt", "tokens")
"""What must be the same, of what an engine tells."""

LARGEST = 1e-4
"""Difference of two log probabilities in fp32."""

Answer = dict[str, Any]


def differences(own: Answer, theirs: Answer) -> list[str]:
    """What differs between two answers to one question; empty where nothing does."""
    found = [name for name in EXACT if name in theirs and own[name] != theirs[name]]
    delta = largest_delta(own, theirs)
    if delta is not None and not delta <= LARGEST:  # written so that NaN differs
        found.append("logprobs")
    return found


def largest_delta(own: Answer, theirs: Answer) -> float | None:
    """Largest difference of log probabilities in one answer; None where they cannot be compared.

    At each place it is over the tokens that both tell. The chosen one must be among them: KeyError.
    """
    if "logprobs" not in theirs or own["tokens"] != theirs["tokens"]:
        return None
    deltas = []
    for token, ours, others in zip(own["tokens"], own["logprobs"], theirs["logprobs"], strict=True):
        told = {str(token)} | (ours.keys() & others.keys())
        deltas += [abs(ours[name] - others[name]) for name in told]
    return max(deltas)


def compared(own: list[Answer], theirs: list[Answer]) -> dict[str, Any]:
    """The comparison of all answers: one row a question, and the sum.

    Raises:
        ValueError: there are not as many answers, or none, or the engine tells neither texts nor lengths.
    """
    if not own or len(own) != len(theirs):
        raise ValueError(f"{len(own)} answers of moellava's and {len(theirs)} of the engine's cannot be compared.")
    if not all({"text", "length"} <= answer.keys() for answer in theirs):
        raise ValueError("The engine's answers have no text and length to compare.")
    rows = [
        {
            "question": ours["question"],
            "image": Path(ours["image"]).name,
            "own": ours["text"],
            "theirs": answer["text"],
            "tokens": ours["length"],
            "differs": differences(ours, answer),
            "logprob": largest_delta(ours, answer),
        }
        for ours, answer in zip(own, theirs, strict=True)
    ]
    deltas = [row["logprob"] for row in rows if row["logprob"] is not None]
    return {
        "answers": len(rows),
        "equal": sum(not row["differs"] for row in rows),
        "compared": sorted({name for answer in theirs for name in (*EXACT, "logprobs") if name in answer}),
        "largest_logprob_difference": max(deltas, default=None),
        "rows": rows,
    }


def table(title: str, result: dict[str, Any]) -> str:
    """A comparison as text."""
    lines = [title, f"  {'question':44}{'moellava':>12}{'engine':>12}{'tokens':>8}{'Δ logprob':>11}"]
    for row in result["rows"]:
        delta = "-" if row["logprob"] is None else f"{row['logprob']:.1e}"
        cells = f"{row['question'][:43]:44}{row['own'][:11]:>12}{row['theirs'][:11]:>12}{row['tokens']:>8}{delta:>11}"
        lines.append(f"  {cells}" + (f"  DIFFERS: {', '.join(row['differs'])}" if row["differs"] else ""))
    largest = result["largest_logprob_difference"]
    told = "" if largest is None else f", largest difference of a log probability {largest:.1e}"
    lines.append(f"  {result['equal']} of {result['answers']} equal ({', '.join(result['compared'])}){told}")
    return "\n".join(lines)


def main() -> int:
    """0 where all answers are equal, else 1."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--title", required=True, help="heading of the table")
    flags.add_argument("--own", required=True, help="JSON file of own_answers.py")
    flags.add_argument("--theirs", required=True, help="JSON file of the engine's answers")
    flags.add_argument("--unlike", help="JSON file of own_answers.py for a model that must answer otherwise: the base")
    flags.add_argument("--output", type=Path, required=True, help="JSON file for the comparison")
    args = flags.parse_args()
    own, theirs = read_answers(args.own), read_answers(args.theirs)
    result = compared(own["answers"], theirs["answers"])
    about = {side["engine"]: {"model": side["model"], "versions": side["versions"]} for side in (own, theirs)}
    args.output.write_text(json.dumps({"title": args.title, **about, **result}, indent=1) + "\n", encoding="utf-8")
    print(table(args.title, result))
    as_base = compared(read_answers(args.unlike)["answers"], theirs["answers"])["equal"] if args.unlike else 0
    if as_base:
        print(f"  {as_base} answers are those of {args.unlike}: what should change them is not there")
    return 0 if result["equal"] == result["answers"] and not as_base else 1


if __name__ == "__main__":
    sys.exit(main())
