# SPDX-License-Identifier: Apache-2.0
"""`moellava demo`: from two small base models to a sparse model that answers questions about pictures, with scores."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from moellava.commands.given import Idle, refuse_idle
from moellava.commands.values import CommandParser, count
from moellava.demo.demo import default_processes, run_demo
from moellava.demo.mixed import PROTOCOLS, run_mixed
from moellava.demo.recipes import DEFAULT, FULL, RECIPES, SMOKE


def make_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    flags = CommandParser(prog="moellava demo", description=__doc__)
    size = flags.add_mutually_exclusive_group()
    for recipe, text in ((FULL, "the longer recipe"), (SMOKE, "a few steps and questions; scores mean nothing")):
        name = recipe.name
        size.add_argument(
            f"--{name}", dest="recipe", action="store_const", const=name, help=f"{text}: {recipe.duration}"
        )
    flags.add_argument(
        "--task",
        choices=("easy-vqa", "mixed"),
        default="easy-vqa",
        help="mixed: more to know than a small language model holds, learnt with experts and without (docs/MOE.md)",
    )
    flags.add_argument("--make-base", action="store_true", help="make the base models anew first (10 minutes more)")
    flags.add_argument("--output-dir", type=Path, help="default: demo, or smoke with --smoke, in --runs")
    flags.add_argument("--runs", type=Path, default=Path("moellava-runs"), help="folder of runs (moellava-runs)")
    flags.add_argument("--processes", type=count, help="training processes (default: 2, or one an accelerator)")
    flags.add_argument("--started", type=float, default=time.time(), help="when the clock started, in Unix seconds")
    return flags


def main(argv: list[str]) -> int:
    """The subcommand. Exit status 1 if a step failed or the scores miss what the recipe promises."""
    parser = make_parser()
    args = parser.parse_args(argv)
    is_mixed = args.task == "mixed"
    idle = [
        Idle(["runs"], args.output_dir, "--output-dir names the folder itself: leave it out"),
        Idle(
            ["make_base", "processes"],
            is_mixed,
            "--task mixed makes its language model anew, and trains in one process",
        ),
    ]
    refuse_idle(parser, argv, idle)
    if is_mixed:
        return run_mixed(PROTOCOLS[args.recipe], args.output_dir or args.runs / "mixed", args.started)
    recipe = RECIPES[args.recipe or DEFAULT.name]
    folder = args.output_dir or args.runs / ("smoke" if recipe is SMOKE else "demo")
    return run_demo(recipe, folder, args.processes or default_processes(), args.make_base, args.started)
