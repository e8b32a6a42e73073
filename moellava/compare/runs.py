"""The trainings of a comparison: each is a run of train.py in its own folder, and goes on where it was stopped."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

from moellava.errors import UserError
from moellava.files import read_json
from moellava.log import get_logger

logger = get_logger(__name__)

LAST_LINES = 20
"""Of the log of a run that has failed, shown with the error."""


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        arm, seed: which it is.
        folder: its `--output_dir`.
        flags: all of train.py's.
    """

    arm: str
    seed: int
    folder: Path
    flags: list[str]

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.arm}-seed{self.seed}"


def launcher_of(words: str | None) -> list[str]:
    """What a run is started with: this Python, or what the user gives in place of `python`, such as
    `deepspeed --num_accelerators 2` or `torchrun --nproc-per-node 2`; then the module."""
    module = ["moellava.train.train"]
    if words is None:
        return [sys.executable, "-m", *module]
    chosen = shlex.split(words)
    return [*chosen, "--module" if Path(chosen[0]).name == "deepspeed" else "-m", *module]


def train(run: Run, launcher: list[str], log: Path) -> None:
    """Runs train.py to its end; a run that is complete is left as it is.

    Args:
        launcher: see `launcher_of`.
        log: where its output goes.

    Raises:
        UserError: it has failed; with its last lines.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    logger.info("%s: training; its output goes to %s", run.name, log)
    with log.open("a", encoding="utf-8") as output, ended_with_us([*launcher, *run.flags], output) as process:
        status = process.wait()
    if status:
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
        raise UserError(f"{end}\n\n{run.name} ended with status {status}; its whole log is {log}")


@contextmanager
def ended_with_us(command: list[str], output: Any) -> Iterator[subprocess.Popen]:
    """A process that does not outlive the block."""
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


@dataclass(frozen=True)
class Measured:
    """What a finished run has written of itself.

    Args:
        steps: optimizer steps.
        tokens_per_second: over the steps, all processes together.
        trained, parameters: numbers that trained, and of the whole model.
        bytes: of the folder's weights.
    """

    steps: int
    tokens_per_second: float
    trained: int
    parameters: int
    bytes: int


def measured(folder: Path) -> Measured:
    """Reads a finished run. Raises UserError where it has logged no throughput (no step, or `--logging_steps` longer
    than it)."""
    state = read_json(folder / "trainer_state.json")
    speeds = [entry["tokens_per_second"] for entry in state["log_history"] if "tokens_per_second" in entry]
    if not speeds:
        raise UserError(
            f"{folder} has logged no throughput in {state['global_step']} steps: give a smaller --logging_steps."
        )
    table = read_json(folder / TABLE)
    return Measured(
        steps=state["global_step"],
        tokens_per_second=harmonic_mean(speeds[1:] or speeds),  # the first steps also fill caches
        trained=sum(row["trainable"] for row in table.values()),
        parameters=sum(sum(row.values()) for row in table.values()),
        bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    )


TABLE = "parameters.json"
