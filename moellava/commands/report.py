# SPDX-License-Identifier: Apache-2.0
"""`moellava report`: a run of train.py as one page and a few pictures, while it trains or afterwards."""

from __future__ import annotations

import argparse
from pathlib import Path

from moellava.commands.values import CommandParser
from moellava.errors import UserError
from moellava.files import IS_FOLDER, NO_FILE, file_problem, problem_of_writing
from moellava.log import printable
from moellava.startup import importing
from moellava.vis.needed import require_packages
from moellava.vis.report import REPORT


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="moellava report", description=__doc__)
    parser.add_argument("run", help="--output_dir of a run")
    parser.add_argument("--output", help=f"folder for the files; those of before are replaced (default: RUN/{REPORT})")
    return parser


def main(argv: list[str]) -> int:
    """Runs the command. Raises UserError where there is no run, or no place to write to."""
    args = _parser().parse_args(argv)
    require_packages("moellava report")
    with importing():
        from moellava.vis.report import write_report
        from moellava.vis.run_files import open_run
    run = open_run(Path(args.run))
    output = Path(args.output) if args.output is not None else run.folder / REPORT
    problem: str | None = file_problem(output) or "it is a file, not a folder"
    if problem in (IS_FOLDER, NO_FILE):
        problem = problem_of_writing(next(place for place in (output, *output.absolute().parents) if place.exists()))
    if problem:
        raise UserError(f"--output {output} cannot be written: {problem}")
    paths = write_report(run, output)
    print(printable(f"Written to {output}: {', '.join(path.name for path in paths)}"))
    return 0
