# SPDX-License-Identifier: Apache-2.0
"""Can the tests fail? Mutations of the package, one at a time, in a copy of the repository that pytest then runs.

    python -m tests.mutants                                  all of them, with the tests that have to kill them
    python -m tests.mutants --only labels-not-shifted        some, by name
    python -m tests.mutants --sample 5 --seed 1              some, by lot

Quick tests only (`-m "not slow"`): first the files that a mutation names, then, if they pass, all others. A mutation
that passes all of them survives, and is a test that is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import copytree, ignore_patterns

from tests.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]

NOT_COPIED = ignore_patterns(".git", ".venv", ".hypothesis", "*_cache", "__pycache__", "*.egg-info", "runs")

OURS = "tests/test_mutants.py"
"""Tests of the mutations themselves: those that say that every one applies would kill them all."""

PASSED, FAILED, INTERRUPTED = 0, 1, 2
"""Exit states of pytest; it is interrupted where a file cannot be imported."""

_CULPRIT = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Result:
    """What became of a mutation.

    Args:
        name: of the mutation.
        killer: the first test that failed; None: it survives.
        seconds: that its tests took.
        named: whether the killer is in a file that the mutation names.
        problem: why it was not tried, if it was not.
    """

    name: str
    killer: str | None
    seconds: float
    named: bool = True
    problem: str | None = None

    @property
    def is_killed(self) -> bool:
        """Whether a test failed."""
        return self.killer is not None

    def line(self) -> str:
        """The row of the table."""
        said = self.problem or self.killer or "SURVIVED"
        return f"{self.name:42} {self.seconds:7.1f}  {said}{'' if self.named else '  (no file that it names)'}"


class NotGreenError(RuntimeError):
    """The tests fail on the package as it is: that they fail on a mutation would say nothing."""


def applied(mutation: Mutation, text: str) -> str:
    """A file's text with a mutation in it. Raises ValueError unless the file holds its line exactly once."""
    found = text.count(mutation.line)
    if found != 1:
        raise ValueError(f"{mutation.name}: moellava/{mutation.file} holds its line {found} times: {mutation.line}")
    return text.replace(mutation.line, mutation.change)


class Copy:
    """A copy of the repository.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path):
        self.root = folder / "copy"
        self.temporary = folder / "pytest"
        copytree(ROOT, self.root, ignore=NOT_COPIED, symlinks=True)

    @property
    def environment(self) -> dict[str, str]:
        """The copy's package before any other, in subprocesses too, and no compiled files, which may be outdated."""
        return os.environ | {
            "PYTHONPATH": str(self.root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }

    def imported_from(self) -> Path:
        """Where Python finds the package in the copy's environment."""
        code = "import moellava; print(moellava.__file__)"
        options = {"capture_output": True, "text": True, "check": True}
        said = subprocess.run([sys.executable, "-c", code], cwd=self.root, env=self.environment, **options).stdout
        return Path(said.strip())

    @contextmanager
    def mutated(self, mutation: Mutation) -> Iterator[None]:
        """Inside, the copy holds the mutation. Raises ValueError: see `applied`."""
        path = self.root / "moellava" / mutation.file
        before = path.read_text(encoding="utf-8")
        path.write_text(applied(mutation, before), encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(before, encoding="utf-8")

    def first_failure(self, files: Sequence[str] = ()) -> str | None:
        """Runs quick tests up to the first that fails: its name, or None where all pass.

        Args:
            files: below `tests/`; none: all there are.

        Raises:
            RuntimeError: pytest itself fails, or finds no tests.
        """
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
        command += [f"--basetemp={self.temporary}", f"--ignore={OURS}", *(f"tests/{file}" for file in files)]
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True)
        if done.returncode == PASSED:
            return None
        culprit = _CULPRIT.search(done.stdout)
        if done.returncode not in (FAILED, INTERRUPTED) or culprit is None:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return culprit[1]


class Trial:
    """Tries mutations in one copy.

    Args:
        copy: of the repository.
        only_named: run no tests but those that a mutation names.
    """

    def __init__(self, copy: Copy, only_named: bool):
        self.copy = copy
        self.only_named = only_named
        self.all_are_green = False

    def require_green(self, files: Sequence[str] = ()) -> None:
        """Raises NotGreenError where tests fail on the package as it is, or another package would be tested."""
        package = self.copy.imported_from()
        if not package.is_relative_to(self.copy.root):
            raise NotGreenError(f"Python imports {package}, not the copy in {self.copy.root}.")
        failure = self.copy.first_failure(files)
        if failure:
            raise NotGreenError(f"{failure} fails without any mutation.")

    def result(self, mutation: Mutation) -> Result:
        """Whether tests kill a mutation."""
        began = time.perf_counter()
        try:
            with self.copy.mutated(mutation):
                killer, named = self.copy.first_failure(mutation.killers), True
            if killer is None and not self.only_named:
                killer, named = self._killer_among_all(mutation), False
        except ValueError as error:
            return Result(mutation.name, None, 0.0, problem=str(error))
        return Result(mutation.name, killer, time.perf_counter() - began, named or killer is None)

    def _killer_among_all(self, mutation: Mutation) -> str | None:
        if not self.all_are_green:
            self.require_green()
            self.all_are_green = True
        with self.copy.mutated(mutation):
            return self.copy.first_failure()


def tried(mutations: Sequence[Mutation], only_named: bool = False) -> Iterator[Result]:
    """The results of some mutations, one by one. Raises NotGreenError where their tests fail without them."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trial = Trial(Copy(Path(folder)), only_named)
        trial.require_green(sorted({file for mutation in mutations for file in mutation.killers}))
        for mutation in mutations:
            yield trial.result(mutation)


def chosen(names: Sequence[str], sample: int | None, seed: int) -> list[Mutation]:
    """Mutations by name, or all; then, of these, some by lot. Raises ValueError for a name that none has."""
    known = {mutation.name: mutation for mutation in MUTATIONS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--only {' '.join(unknown)}: known are {', '.join(known)}")
    some = [known[name] for name in names] or list(MUTATIONS)
    return some if sample is None else random.Random(seed).sample(some, min(sample, len(some)))


def main(argv: list[str] | None = None) -> int:
    """Prints a table. Exit status 1: one survives or no longer applies; 2: the tests fail without a mutation."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these mutations")
    parser.add_argument("--sample", type=int, metavar="N", help="as many, drawn by lot")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of --sample (0)")
    parser.add_argument(
        "--tests", choices=("quick", "named"), default="quick", help="named: only the files that a mutation names"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go as well")
    flags = parser.parse_args(argv)
    results = []
    try:
        for result in tried(chosen(flags.only, flags.sample, flags.seed), flags.tests == "named"):
            print(result.line(), flush=True)
            results.append(result)
    except (NotGreenError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if flags.json:
        flags.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n", encoding="utf-8")
    killed = sum(result.is_killed for result in results)
    print(f"{killed} of {len(results)} are killed.")
    return 0 if killed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
