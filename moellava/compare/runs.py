# SPDX-License-Identifier: Apache-2.0
"""The trainings of a comparison: each is a run of train.py in its own folder, and goes on where it was stopped."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moellava.errors import UserError
from moellava.files import read_json
from moellava.log import get_logger
from moellava.train.run_log import RUN_LOG, read_lines

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
    module = ["moellava.train"]
    if words is None:
        return [sys.executable, "-m", *module]
    chosen = shlex.split(words)
    is_deepspeed = any(Path(word).name == "deepspeed" for word in chosen)  # behind `env NAME=VALUE`, too
    return [*chosen, "--module" if is_deepspeed else "-m", *module]


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
        records: that trained, over all steps.
        tokens_per_second: over the steps, all processes together.
        seconds: of training.
        trained: numbers that trained.
        bytes: of the folder's weights.
    """

    steps: int
    records: float
    tokens_per_second: float
    seconds: float
    trained: int
    bytes: int


def measured(folder: Path) -> Measured:
    """Reads a finished run. Raises UserError where its log is missing."""
    lines = read_lines(folder / RUN_LOG)
    if not lines or lines[-1]["event"] != "end":
        raise UserError(f"{folder / RUN_LOG} does not end as that of a finished run does. Remove {folder} to run anew.")
    end, table = lines[-1], read_json(folder / "parameters.json")
    return Measured(
        steps=end["step"],
        records=end["samples"],
        tokens_per_second=end["tokens"] / end["training"],
        seconds=end["training"],
        trained=sum(row["trainable"] for row in table.values()),
        bytes=weights_of(folder),
    )


def weights_of(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
