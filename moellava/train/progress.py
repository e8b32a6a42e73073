# SPDX-License-Identifier: Apache-2.0
"""What a run shows: one bar, one line per log step. A line is short whatever the model; a log file holds it whole."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from moellava.log import WHOLE, get_logger
from moellava.vis.run_files import NOT_SCORES

logger = get_logger(__name__)

SCORE = "eval_score/"
"""Prefix of the log keys of benchmarks (`--eval_task`)."""

LOAD = "expert_load/"
"""Prefix of the log keys `expert_load/layer_{L}/expert_{E}`: share of routed tokens, in the unit interval."""

DEAD = "router_dead/"
"""Prefix of the log keys `router_dead/layer_{L}`: experts that no token chose."""

LONGEST = 159
"""Characters of a line."""

SPARED = ("ce", "padding", "memory", "grad", "tokens", "aux")
"""What a line goes without where it would be longer, in this order."""


@dataclass
class Clock:
    """How long a run has taken, what it has seen, and how long it will take. Times are in seconds.

    Attributes:
        began: when this process began with the steps; `time.perf_counter`.
        first_step: the step that it began behind.
        before: seconds that the run took before it was stopped and went on here.
        samples, tokens: that were trained on, over all processes; tokens include those of images.
        training: seconds of training alone, without evaluations and saves.
    """

    began: float = field(default_factory=time.perf_counter)
    first_step: int = 0
    before: float = 0.0
    samples: float = 0.0
    tokens: float = 0.0
    training: float = 0.0

    def begin(self, step: int, before: Mapping[str, float] = {}) -> None:
        """Starts behind a step.

        Args:
            before: what the last line of the run's log holds, of a run that goes on.
        """
        self.began, self.first_step = time.perf_counter(), step
        self.before = before.get("elapsed", 0.0)
        self.samples, self.tokens = before.get("samples", 0.0), before.get("tokens", 0.0)
        self.training = before.get("training", 0.0)

    def count(self, samples: float, tokens: float, seconds: float) -> None:
        """Adds what was trained on since the last call, and the seconds that it took."""
        self.samples += samples
        self.tokens += tokens
        self.training += seconds

    @property
    def elapsed(self) -> float:
        """Seconds of the run until now."""
        return self.before + time.perf_counter() - self.began

    def remaining(self, step: int, last_step: int) -> float:
        """Seconds until the last step, if steps take as long as they did; infinite before the first."""
        done = step - self.first_step
        return (self.elapsed - self.before) / done * (last_step - step) if done > 0 else math.inf

    def numbers(self) -> dict[str, float]:
        """What a line of the run's log says of it; `begin` takes it back."""
        sums = {"samples": self.samples, "tokens": self.tokens, "training": self.training}
        return {"elapsed": self.elapsed, "memory": peak_memory()} | sums

    def totals(self, step: int) -> str:
        """The last words of a run."""
        seconds = max(self.training, 1e-9)
        rates = f"{self.samples / seconds:,.2f} samples/s, {self.tokens / seconds:,.0f} tokens/s"
        return (
            f"Totals: {step:,} steps, {self.samples:,.0f} samples, {self.tokens:,.0f} tokens; {self.training:,.1f} s "
            f"of training ({rates}), {self.elapsed:,.1f} s in all; peak memory {gigabytes(peak_memory())}"
        )


def peak_memory() -> float:
    """Bytes that this process has held at most: of its accelerator, or of the machine where it has none."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def gigabytes(count: float) -> str:
    """Bytes in GB (powers of ten)."""
    return f"{count / 1e9:.1f} GB"


def duration(seconds: float) -> str:
    """Seconds as 1:02:03, 2:03, or 3d04h."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02}h"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def short(number: float) -> str:
    """A number with four decimals, or four digits where it is large."""
    return f"{number:.4f}" if abs(number) < 1000 else f"{number:.3e}"


class Layer(NamedTuple):
    """Load of a sparse layer: its index as text, and the share of routed tokens of each expert."""

    name: str
    shares: list[float]

    @property
    def unevenness(self) -> float:
        """The largest load, as a multiple of the even share."""
        return max(self.shares) * len(self.shares)


def layers_of(logs: Mapping[str, Any]) -> list[Layer]:
    """The sparse layers that log keys tell of, in order."""
    layers: dict[str, list[float]] = {}
    for key, value in logs.items():
        if key.startswith(LOAD):
            layers.setdefault(key.split("/")[1].removeprefix("layer_"), []).append(value)
    return [Layer(index, shares) for index, shares in layers.items()]


def percent(share: float) -> str:
    """A share as per cent: 0.3, 12."""
    return f"{100 * share:.0f}" if share >= 0.0995 or share == 0 else f"{100 * share:.1f}"


def load_of(logs: Mapping[str, Any]) -> str:
    """Smallest and largest load of the most uneven layer, and the dead experts of all layers."""
    worst = max(layers_of(logs), key=lambda layer: layer.unevenness)
    dead = round(sum(value for key, value in logs.items() if key.startswith(DEAD)))
    return f"load {percent(min(worst.shares))}-{percent(max(worst.shares))}% in layer {worst.name}, {dead} dead"


def scores_of(logs: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What an evaluation found, by name."""
    for key, value in logs.items():
        if key.startswith("eval_") and not key.endswith(NOT_SCORES) and isinstance(value, int | float):
            yield (key.removeprefix("eval_") if key.startswith(SCORE) else key), value


def parts_of_line(step: int, last_step: int, logs: Mapping[str, Any], clock: Clock) -> dict[str, str]:
    """name -> a part of the line of a log step, in order; without the load of experts."""
    parts = {"step": f"step {step}/{last_step}"}
    losses = ("loss", "ce", "aux", "z") if "aux" in logs else ("loss",)  # alone, the cross-entropy is the loss
    parts |= {key: f"{key} {short(logs[key])}" for key in losses if key in logs}
    parts |= {key: f"{key} {short(value)}" for key, value in scores_of(logs)}
    if "learning_rate" in logs:
        parts["rate"] = f"lr {logs['learning_rate']:.2e}"
    if "grad_norm" in logs:
        parts["grad"] = f"grad {float(logs['grad_norm']):.3g}"
    if "tokens_per_second" in logs:
        parts["tokens"] = f"{logs['tokens_per_second']:,.0f} tokens/s"
        parts["memory"] = gigabytes(peak_memory())
    if "padding" in logs:
        parts["padding"] = f"padding {logs['padding']:.0%}"
    parts["time"] = f"{duration(clock.elapsed)}<{duration(clock.remaining(step, last_step))}"
    return parts


def format_line(step: int, last_step: int, logs: Mapping[str, Any], clock: Clock) -> str:
    """One log step as a line of at most `LONGEST` characters.

    Losses, rate, norm of the gradient, throughput, peak memory, time until now < time that remains; of the experts the
    most uneven layer and how many are dead. The z-loss is left to `whole_line`.
    """
    parts = parts_of_line(step, last_step, logs, clock)
    parts.pop("z", None)
    if layers_of(logs):
        parts["load"] = load_of(logs)
    for name in SPARED:
        if len("  ".join(parts.values())) <= LONGEST:
            break
        parts.pop(name, None)
    line = "  ".join(parts.values())
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"  # scores of many evaluations


def whole_line(step: int, last_step: int, logs: Mapping[str, Any], clock: Clock) -> str:
    """One log step with each sparse layer's load as percentages."""
    parts = [*parts_of_line(step, last_step, logs, clock).values()]
    layers = layers_of(logs)
    parts += [f"load[{layer.name}] {' '.join(f'{100 * share:.0f}' for share in layer.shares)}%" for layer in layers]
    return "  ".join([*parts, *([load_of(logs)] if layers else [])])


def say_line(step: int, last_step: int, logs: Mapping[str, Any], clock: Clock) -> None:
    """Logs a step: a short line for the terminal, all of it for a file."""
    whole = whole_line(step, last_step, logs, clock)
    logger.info("%s", format_line(step, last_step, logs, clock), extra={WHOLE: whole})


class RunLines(TrainerCallback):
    """Log lines alone, for output that is not a terminal."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Logs a step on the first process."""
        if logs and "train_runtime" not in logs:
            say_line(state.global_step, state.max_steps, logs, self.clock)


class RunProgress(ProgressCallback):
    """HF's progress bar with the log lines above it, for a terminal."""

    def __init__(self, clock: Clock):
        super().__init__()
        self.clock = clock

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Logs a step above the bar on the first process."""
        if self.training_bar is not None and logs and "train_runtime" not in logs:
            with tqdm.external_write_mode(file=sys.stderr):
                say_line(state.global_step, state.max_steps, logs, self.clock)
