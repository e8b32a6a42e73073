# SPDX-License-Identifier: Apache-2.0
"""`run_log.jsonl`: every line of a run as numbers, written as it is said, and continued by a run that goes on.

A line is a JSON object: `event` (start, train, eval, sample, end), `step`, `time` (Unix seconds), and what the event
has. Lines of training hold loss, ce, aux, z, learning_rate, grad_norm, tokens_per_second, samples_per_second; the
run's sums until then: elapsed (seconds), training (seconds without evaluations and saves), samples, tokens, memory
(bytes); and `layers`: index -> load, load_image, load_text (shares of each expert), entropy (nats), dead, dropped.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from moellava.files import written
from moellava.log import get_logger
from moellava.train.progress import Clock
from moellava.vis.run_files import RUN_LOG, nested, read_lines

logger = get_logger(__name__)

TEXT_LOG = "run.log"
"""The same in words, with all that was said beside it."""

PACKAGES = ("moellava", "torch", "transformers", "tokenizers", "accelerate", "deepspeed", "peft")
"""Whose versions a run's log tells, where they are installed."""


def is_kept(line: Mapping[str, Any], step: int) -> bool:
    """Whether a line stays in the log of a run that goes on behind a step; none does where it starts anew."""
    return 0 < step >= line.get("step", 0) and line.get("event") != "end"


def versions() -> dict[str, str]:
    """Of Python and of the packages that shape a run."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class RunLog(TrainerCallback):
    """Writes the log of a run, on the first process.

    Args:
        folder: of the run.
        clock: of the run; what it knew before a run went on, it learns here.
        facts: what the first line says beside versions and steps.
        rest: what is known at the end of the steps that no line was about.
    """

    def __init__(
        self,
        folder: Path,
        clock: Clock,
        facts: Mapping[str, Any] = {},
        rest: Callable[[], Mapping[str, float]] = dict,
    ):
        self.path = folder / RUN_LOG
        self.clock = clock
        self.facts = facts
        self.rest = rest

    def on_train_begin(self, args, state, control, **kwargs):
        """Keeps the lines until the step that the run goes on behind, and adds one about the start."""
        before: dict[str, float] = {}
        if state.is_world_process_zero:
            kept = [line for line in read_lines(self.path) if is_kept(line, state.global_step)]
            before = next((line for line in reversed(kept) if "elapsed" in line), {})
            with written(self.path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            began = {"steps": state.max_steps, "processes": args.world_size, "versions": versions()}
            self.add("start", state.global_step, {**began, **self.facts})
        self.clock.begin(state.global_step, before)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Adds a line of training, or of an evaluation."""
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            event = "eval" if any(key.startswith("eval_") for key in logs) else "train"
            self.add(event, state.global_step, nested(logs) | self._sums())

    def on_train_end(self, args, state, control, **kwargs):
        """Adds a line about the steps behind the last one, and the last; says the totals."""
        if state.is_world_process_zero:
            if rest := self.rest():
                self.add("train", state.global_step, nested(rest) | self._sums())
            self.add("end", state.global_step, self._sums())
            logger.info("%s", self.clock.totals(state.global_step))

    def _sums(self) -> dict[str, Any]:
        return {name: round(number, 3) for name, number in self.clock.numbers().items()}

    def add(self, event: str, step: int, content: Mapping[str, Any]) -> None:
        """Appends a line in one write, so that no reader sees half of one."""
        line = json.dumps({"event": event, "step": step, "time": round(time.time(), 3)} | dict(content)) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
