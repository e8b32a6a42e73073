# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed at any operation on their files, and started again: the end is the same to the bit.

A child of this process trains; an audit hook counts what it does to files below its output folder (opens for writing,
renames, removals, new folders) and ends the process, as SIGKILL would, before the operation of a given number.
"""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from tests.attacks.outcome import Outcome
from tests.processes import Flags, train_here
from tests.tiny import weights_of

POINTS = 40
"""Kill points of each stage."""

QUICK_POINTS = 2

STAGES = ("pretrain", "finetune", "moe")

LENGTHS: dict[str, Flags] = {
    "steps": {"max_steps": 3, "save_steps": 1},
    "broken epoch": {"max_steps": -1, "num_train_epochs": 0.2, "save_steps": 1},
    "epochs": {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "epoch", "per_device_train_batch_size": 8},
}
"""How long a run is; a kill behind its last checkpoint must not lengthen it."""

KILLED = 9
CHANGING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.chmod"}


def operates(event: str, arguments: tuple, folder: str) -> bool:
    """Whether an audit event changes files below a folder."""
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & os.O_WRONLY)
        return writes and str(arguments[0]).startswith(folder)
    return event in CHANGING and str(arguments[0]).startswith(folder)


def in_child(work: Callable[[], None]) -> int:
    """Does something in a forked child; returns its exit status, 1 where it has raised."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:  # noqa: BLE001 (the child must end here, whatever happened)
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(point: int, flags: Flags) -> int:
    """Trains in a child that is killed before an operation on files; returns its exit status."""

    def work() -> None:
        seen, folder = 0, str(flags["output_dir"])

        def hook(event: str, arguments: tuple) -> None:
            nonlocal seen
            if operates(event, arguments, folder):
                if seen == point:
                    os._exit(KILLED)
                seen += 1

        sys.addaudithook(hook)
        train_here(flags)

    return in_child(work)


def operations_of(flags: Flags, folder: Path) -> int:
    """How many operations on files a run makes."""
    note = folder / "operations"

    def work() -> None:
        seen: list[str] = []
        output = str(flags["output_dir"])
        sys.addaudithook(lambda event, given: seen.append(event) if operates(event, given, output) else None)
        train_here(flags)
        count = len(seen)
        note.write_text(str(count))

    if in_child(work) != 0:
        raise RuntimeError(f"the run that is to be killed does not even end: {flags}")
    return int(note.read_text())


def kill_everywhere(flags: Flags, folder: Path, points: int) -> Outcome:
    """Kills a run at points that are spread over it, starts each again, and compares what it leaves.

    Args:
        flags: of the run.
        folder: for what it leaves; made here.
        points: how many.
    """
    outcome = Outcome()
    folder.mkdir(parents=True)
    whole = flags | {"output_dir": folder / "whole"}
    count = operations_of(whole, folder)
    reference = weights_of(folder / "whole")
    for point in sorted({round(index * (count - 1) / max(points - 1, 1)) for index in range(points)}):
        run = flags | {"output_dir": folder / f"killed-at-{point}"}
        status = killed_at(point, run)
        again = in_child(lambda run=run: train_here(run))
        problem = difference(Path(str(run["output_dir"])), reference)
        if status != KILLED or again != 0 or problem:
            outcome.failures.append(f"operation {point} of {count}: exit {status}, then {again}: {problem}")
        else:
            outcome.counts["goes on"] += 1
        shutil.rmtree(str(run["output_dir"]), ignore_errors=True)
    return outcome


def difference(folder: Path, reference: Mapping[str, torch.Tensor]) -> str | None:
    """How the weights of a folder differ from those of a run that was not killed; None if they are equal."""
    found = weights_of(folder)
    if found.keys() != reference.keys():
        return f"{len(found)} tensors instead of {len(reference)}"
    other = [name for name in reference if not torch.equal(found[name], reference[name])]
    return f"other weights: {other[:3]}" if other else None


def attacks(
    everything: bool, folder: Path, flags_for: Callable[[Path, str], Flags] | None = None
) -> dict[str, Outcome]:
    """Rows of the table -> what became of killed runs.

    Args:
        everything: all stages and lengths at `POINTS` points; else stage 1 at a few.
        folder: for the runs.
        flags_for: as in `tests/conftest.py`; None: of tiny parts that are made here.
    """
    make = flags_for or own_flags(folder)
    cases = [("pretrain", "steps")]
    if everything:
        cases = [*((stage, "steps") for stage in STAGES), ("pretrain", "broken epoch"), ("pretrain", "epochs")]
        for stage in STAGES[:2]:  # what the next stage starts from
            if in_child(lambda stage=stage: train_here(make(folder, stage) | {"max_steps": 1, "save_strategy": "no"})):
                raise RuntimeError(f"stage {stage} does not end")
    return {
        f"kills, {stage}, {length}": kill_everywhere(
            make(folder, stage) | LENGTHS[length] | {"skip_dry_save": not everything},
            folder / f"{stage} {length}".replace(" ", "-"),
            POINTS if everything else QUICK_POINTS,
        )
        for stage, length in cases
    }


def own_flags(folder: Path) -> Callable[[Path, str], Flags]:
    """`flags_for` outside of pytest, for parts in a folder."""
    from tests.conftest import stage_flags, write_parts
    from tests.tiny import write_tokenizer

    return stage_flags(write_parts(folder / "parts", write_tokenizer(folder / "tokenizer")))
