"""What a run shows: one bar, one line per log step."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from moellava.log import get_logger

logger = get_logger(__name__)

LOAD = "expert_load/"
"""Prefix of the log keys `expert_load/layer_{L}/expert_{E}`: share of routed tokens, in the unit interval."""


def format_line(step: int, last_step: int, logs: dict[str, Any]) -> str:
    """One log step as a line: losses apart, rate, throughput, padding as a share of positions, and each MoE layer's
    load as percentages."""
    shown = [f"step {step}/{last_step}"]
    shown += [f"{key} {logs[key]:.4f}" for key in ("loss", "ce", "aux", "z", "eval_loss") if key in logs]
    if "learning_rate" in logs:
        shown.append(f"lr {logs['learning_rate']:.2e}")
    if "tokens_per_second" in logs:
        shown.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    if "padding" in logs:
        shown.append(f"padding {logs['padding']:.0%}")
    layers: dict[str, list[str]] = {}
    for key, value in logs.items():
        if key.startswith(LOAD):
            layers.setdefault(key.split("/")[1].removeprefix("layer_"), []).append(f"{100 * value:.0f}")
    shown += [f"load[{layer}] {' '.join(shares)}%" for layer, shares in layers.items()]
    return "  ".join(shown)


class RunLines(TrainerCallback):
    """Log lines alone, for output that is not a terminal."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Logs a step on the first process."""
        if logs and "train_runtime" not in logs:
            logger.info("%s", format_line(state.global_step, state.max_steps, logs))


class RunProgress(ProgressCallback):
    """HF's progress bar with the log lines above it, for a terminal."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Prints a log step above the bar on the first process."""
        if self.training_bar is not None and logs and "train_runtime" not in logs:
            self.training_bar.write(format_line(state.global_step, state.max_steps, logs))
