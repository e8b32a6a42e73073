# SPDX-License-Identifier: Apache-2.0
"""The load of experts as histograms, in the trackers of `--report_to` that have them.

Scalars go to every tracker through transformers' own callbacks: `expert_load/layer_3/expert_0` and so on, 64 curves of
a layer with 64 experts. A histogram shows a layer as one picture: experts from left to right, their shares as heights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from transformers import TrainerCallback

EXPERT = re.compile(r"(.+/layer_\d+)/expert_(\d+)")
"""Key of an expert's number in the log."""

SCALE = 1000
"""Counts that stand for a share of 1: trackers take whole counts."""


def shares_of(logs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Key of a layer -> [E], what its experts have, in their order."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for key, value in logs.items():
        if match := EXPERT.fullmatch(key):
            found[match[1]][int(match[2])] = float(value)
    return {layer: np.array([values[expert] for expert in sorted(values)]) for layer, values in found.items()}


def counts_and_edges(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[E] shares -> [E] counts and [E + 1] edges: expert e lies between e - ½ and e + ½."""
    return np.rint(SCALE * shares).astype(int), np.arange(len(shares) + 1) - 0.5


def to_tensorboard(callback: Any, step: int, layers: Mapping[str, np.ndarray]) -> None:
    """Into TensorBoard's tab 'Histograms'."""
    for layer, shares in layers.items():
        counts, edges = counts_and_edges(shares)
        experts = np.arange(len(shares))
        callback.tb_writer.add_histogram_raw(
            f"histograms/{layer}",
            min=0,
            max=len(shares) - 1,
            num=int(counts.sum()),
            sum=float(counts @ experts),
            sum_squares=float(counts @ experts**2),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )


def to_wandb(callback: Any, step: int, layers: Mapping[str, np.ndarray]) -> None:
    """Into charts of W&B, over the steps that its scalars have."""
    tracker = callback._wandb
    made = {f"train/{layer}": tracker.Histogram(np_histogram=counts_and_edges(s)) for layer, s in layers.items()}
    tracker.log({**made, "train/global_step": step})


def to_trackio(callback: Any, step: int, layers: Mapping[str, np.ndarray]) -> None:
    """Into charts of Trackio, which counts by itself: experts, each as often as its share says."""
    tracker = callback._trackio
    made = {}
    for layer, shares in layers.items():
        made[f"train/{layer}"] = tracker.Histogram(np.repeat(np.arange(len(shares)), counts_and_edges(shares)[0]))
    tracker.log({**made, "train/global_step": step})


HISTOGRAMS: dict[str, Callable[[Any, int, Mapping[str, np.ndarray]], None]] = {
    "TensorBoardCallback": to_tensorboard,
    "WandbCallback": to_wandb,
    "TrackioCallback": to_trackio,
}
"""transformers' callback of a tracker -> how it is given histograms. MLflow has none."""


class ExpertHistograms(TrainerCallback):
    """Gives each tracker of a run the load of its experts whenever scalars are logged.

    Args:
        callbacks: those of the trainer, trackers among them.
    """

    def __init__(self, callbacks: list[TrainerCallback]):
        found = [(HISTOGRAMS.get(type(callback).__name__), callback) for callback in callbacks]
        self.trackers = [(give, callback) for give, callback in found if give is not None]

    def on_log(self, args, state, control, logs=None, **kwargs):
        """On the first process."""
        layers = shares_of(logs or {})
        for give, callback in self.trackers if layers and state.is_world_process_zero else ():
            give(callback, state.global_step, layers)
