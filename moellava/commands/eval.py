# SPDX-License-Identifier: Apache-2.0
"""`moellava eval`: scores a model on a benchmark, and writes the score beside how it was taken."""

from __future__ import annotations

import argparse
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import moellava.eval.easy_vqa  # noqa: F401  (registers the benchmark)
from moellava.commands.given import Idle, refuse_idle
from moellava.commands.values import count
from moellava.eval.benchmarks import BENCHMARKS, shuffle_images
from moellava.files import require_output, write_json
from moellava.log import printable
from moellava.startup import importing


def parser() -> argparse.ArgumentParser:
    """The flags of `moellava eval`."""
    flags = argparse.ArgumentParser(prog="moellava eval", description=__doc__)
    flags.add_argument("--model-path", required=True, help="folder of any vision-language model")
    flags.add_argument("--benchmark", default="easy-vqa", help=f"one of: {', '.join(BENCHMARKS)}")
    flags.add_argument("--shuffle-images", action="store_true", help="give each question another question's image")
    flags.add_argument("--seed", type=int, default=0, help="of --shuffle-images and --limit (default 0)")
    flags.add_argument("--limit", type=count, help="score only so many questions, drawn at random (default: all)")
    flags.add_argument("--batch-size", type=count, default=256, help="questions answered at once (default 256)")
    flags.add_argument("--output", help="JSON file for the score, prompt, settings and versions")
    return flags


def main(argv: list[str]) -> int:
    """Runs the command. A wrong flag is a UserError before the model loads."""
    flags = parser()
    args = flags.parse_args(argv)
    unused = args.limit is None and not args.shuffle_images
    refuse_idle(flags, argv, [Idle(["seed"], unused, "is read with --limit or --shuffle-images alone")])
    check(args)
    benchmark = BENCHMARKS[args.benchmark]()
    questions = benchmark.questions()
    if args.limit is not None and args.limit < len(questions):
        picked = random.Random(args.seed).sample(range(len(questions)), args.limit)
        questions = [questions[index] for index in sorted(picked)]
    if args.shuffle_images:
        questions = shuffle_images(questions, args.seed)

    with importing():
        from moellava.eval.scoring import answers_of, report
        from moellava.vlm import open_vlm
    vlm = open_vlm(args.model_path)
    started = time.monotonic()
    answers = answers_of(vlm, questions, max_new_tokens=benchmark.max_new_tokens, batch_size=args.batch_size)
    seconds = round(time.monotonic() - started, 1)
    scored = report(benchmark, questions, answers, vlm=vlm, settings=settings(args))
    result = {**scored, "seconds": seconds}
    print(printable(summary(result)))
    if args.output is not None:
        write_json(Path(args.output), result)
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises UserError for a flag that cannot be met."""
    BENCHMARKS[args.benchmark]
    if args.output is not None:
        with suppress(OSError, ValueError):  # what stands in the way is named next
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        require_output(args.output, "--output")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the score, as it is written into the report."""
    return {
        "model_path": args.model_path,
        "shuffle_images": args.shuffle_images,
        "seed": args.seed,
        "limit": args.limit,
        "batch_size": args.batch_size,
    }


def summary(result: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    shuffled = ", images shuffled between questions" if result["settings"]["shuffle_images"] else ""
    lines = [
        f"{result['benchmark']} ({result['split']} split{shuffled}): {100 * result['accuracy']:.2f}% "
        f"of {result['questions']} questions, {result['seconds']:.0f} s"
    ]
    lines += [
        f"  {name:8} {100 * part['accuracy']:6.2f}% of {part['total']}" for name, part in result["by_category"].items()
    ]
    if result["unanswered"]:
        lines.append(f"  {len(result['unanswered'])} questions could not be answered, and count as wrong")
    return "\n".join(lines)
