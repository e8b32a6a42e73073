# SPDX-License-Identifier: Apache-2.0
"""`moellava eval`: scores a model on benchmarks, and writes each score beside how it was taken."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from pathlib import Path

from moellava.commands.given import Idle, refuse_idle
from moellava.commands.values import CommandParser, count
from moellava.errors import UserError
from moellava.eval.judge import URL_VARIABLE
from moellava.eval.launch import own_command, run_processes
from moellava.eval.layout import DATA_FOLDER
from moellava.eval.suite import BENCHMARKS
from moellava.files import require_output
from moellava.log import printable
from moellava.startup import importing


def parser() -> argparse.ArgumentParser:
    """The flags of `moellava eval`."""
    flags = CommandParser(prog="moellava eval", description=__doc__)
    flags.add_argument("--model-path", required=True, help="folder of any vision-language model")
    flags.add_argument(
        "--task", "--benchmark", nargs="+", default=["easy-vqa"], help=f"some of: {', '.join(BENCHMARKS)}"
    )
    flags.add_argument("--split", help="of the task (default: the one that is usually reported)")
    flags.add_argument(
        "--data-folder", type=Path, default=Path(DATA_FOLDER), help=f"where the tasks' folders lie ({DATA_FOLDER})"
    )
    flags.add_argument("--shuffle-images", action="store_true", help="give each question another question's image")
    flags.add_argument("--seed", type=int, default=0, help="of --shuffle-images and --limit (default 0)")
    flags.add_argument("--limit", type=count, help="score only so many questions, drawn at random (default: all)")
    flags.add_argument("--batch-size", type=count, default=256, help="questions answered at once (default 256)")
    flags.add_argument("--max-new-tokens", type=count, help="longest answer, in tokens (default: the task's)")
    flags.add_argument("--processes", type=count, default=1, help="that share the questions on this machine (1)")
    flags.add_argument("--output", help="JSON file for the score, prompt, settings and versions")
    flags.add_argument("--output-dir", type=Path, help="folder for answers, results, submissions; a run goes on")
    flags.add_argument("--against", type=Path, help="another result, or --output-dir, to compare with")
    flags.add_argument(
        "--judge-url", "--judge_url", default=os.environ.get(URL_VARIABLE), help="the judge's OpenAI API"
    )
    flags.add_argument("--judge-model", "--judge_model", help="the judge's name there")
    return flags


def main(argv: list[str]) -> int:
    """Runs the command. A wrong flag or folder of data is a UserError before the model loads."""
    flags = parser()
    args = flags.parse_args(argv)
    refuse_idle(flags, argv, idle(args))
    check(args)
    with importing():
        from moellava.eval.jobs import check_jobs, job_of, run_jobs
    jobs = [job_of(name, args) for name in args.task]
    check_jobs(jobs, args)
    if args.processes > 1 and "RANK" not in os.environ:
        return run_processes(own_command(["eval", *argv]), args.processes)
    for said in run_jobs(jobs, args):
        print(printable(said), flush=True)
    return 0


def idle(args: argparse.Namespace) -> list[Idle]:
    """Flags that nothing would read."""
    undrawn = args.limit is None and not args.shuffle_images
    known = [BENCHMARKS[name] for name in args.task if name in BENCHMARKS]
    judged = {"llava-bench", "mm-vet"} & set(args.task)
    return [
        Idle(["seed"], undrawn, "is read with --limit or --shuffle-images alone"),
        Idle(["split"], len(args.task) > 1, "is that of one --task"),
        Idle(["data_folder"], args.task == ["easy-vqa"], "is read by tasks other than easy-vqa"),
        Idle(["judge_url", "judge_model"], known and not judged, "is read by llava-bench and mm-vet alone"),
        Idle(["judge_model"], judged and not args.judge_url, f"needs --judge-url, or the variable {URL_VARIABLE}"),
    ]


def check(args: argparse.Namespace) -> None:
    """Raises UserError for a flag that cannot be met."""
    for name in args.task:
        _ = BENCHMARKS[name]
    if len(set(args.task)) < len(args.task):
        raise UserError(f"--task {' '.join(args.task)}: each once.")
    if args.output is not None:
        if len(args.task) > 1:
            raise UserError(f"--output {args.output} is one result, and there are {len(args.task)} tasks: --output-dir")
        with suppress(OSError, ValueError):  # what stands in the way is named next
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        require_output(args.output, "--output")
    if args.output_dir is not None:
        with suppress(OSError):
            args.output_dir.mkdir(parents=True, exist_ok=True)
        require_output(args.output_dir / "result.json", "--output-dir")
    if max(args.processes, int(os.environ.get("WORLD_SIZE", "1"))) > 1 and args.output_dir is None:
        raise UserError("Several processes need --output-dir: they leave their answers there for each other.")
