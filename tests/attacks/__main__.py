# SPDX-License-Identifier: Apache-2.0
"""Every attack there is, and what came of it.

    python -m tests.attacks                          # a quick share of each: a minute
    python -m tests.attacks --all                    # all of them: about an hour on two cores
    python -m tests.attacks --only media --all       # one module of this folder
    python -m tests.attacks --all --table docs/RELIABILITY.md    # puts its table into the page

An attack is a module here with `attacks(everything, folder)`, which returns an `Outcome` for each row of the table. The
exit status is 1 if any input was silent, lost or ended in a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from moellava.startup import importing
from tests import attacks as package
from tests.attacks.outcome import Outcome

Attacks = Callable[[bool, Path], dict[str, Outcome]]

HEAD = "| attack | inputs | what came of them | tracebacks, silent or lost | seconds |\n|---|---|---|---|---|"
BEGIN, END = "<!-- table: python -m tests.attacks --all -->", "<!-- end -->"


@cache
def areas() -> dict[str, Attacks]:
    """Name of a module -> its attacks."""
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    with importing():  # children that are forked share what is imported, and collect no garbage in it
        modules = {name: importlib.import_module(f"tests.attacks.{name}") for name in names if name != "__main__"}
    return {name: module.attacks for name, module in modules.items() if hasattr(module, "attacks")}


def row(name: str, outcome: Outcome, seconds: float) -> str:
    """A line of the table."""
    counts = sorted(outcome.counts.items(), key=lambda entry: -entry[1])
    found = ", ".join(f"{count:,} {verdict}" for verdict, count in counts)
    inputs = sum(outcome.counts.values()) + len(outcome.failures)
    return f"| {name} | {inputs:,} | {found} | {len(outcome.failures)} | {seconds:.0f} |"


def put_into(page: Path, table: str) -> None:
    """Replaces the table of a page. Raises ValueError if the page has no place for it."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no place for the table: {BEGIN} … {END}")
    page.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Prints the table and every failure; see above."""
    parser = argparse.ArgumentParser(prog="python -m tests.attacks", description="Bad inputs, and what came of them.")
    parser.add_argument("--all", action="store_true", help="all inputs, not a quick share")
    parser.add_argument("--only", nargs="+", choices=areas(), default=list(areas()), help="modules of this folder")
    parser.add_argument("--table", type=Path, help="a page whose table is replaced")
    args = parser.parse_args(argv)
    lines, failures = [HEAD], 0
    print(HEAD, flush=True)
    for area in args.only:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="attacks-") as folder:
            outcomes = areas()[area](args.all, Path(folder))
        for name, outcome in outcomes.items():
            lines.append(row(name, outcome, (time.monotonic() - began) / len(outcomes)))
            print(lines[-1], flush=True)
            for failure in outcome.failures:
                print(f"{area}, {name}: {failure}", file=sys.stderr)
            failures += len(outcome.failures)
    if args.table:
        put_into(args.table, "\n".join(lines))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
