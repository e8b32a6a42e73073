# SPDX-License-Identifier: Apache-2.0
"""Trackers get the load of experts as histograms; a tracker that is not installed is named before anything loads."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moellava.errors import UserError
from moellava.train.arguments import parse_arguments
from moellava.train.trackers import ExpertHistograms, counts_and_edges, shares_of
from tests.processes import train_here

LOGS = {"loss": 1.0, "router_entropy/layer_2": 0.5}
LOGS |= {f"expert_load/layer_2/expert_{expert}": share for expert, share in enumerate((0.5, 0.25, 0.0, 0.25))}
LOGS |= {f"expert_load/layer_10/expert_{expert}": 1 / 12 for expert in range(12)}
STATE = SimpleNamespace(is_world_process_zero=True, global_step=7)


def test_a_layers_experts_are_found_in_their_order():
    shares = shares_of(dict(reversed(LOGS.items())))
    assert shares["expert_load/layer_2"].tolist() == [0.5, 0.25, 0.0, 0.25]
    assert shares.keys() == {"expert_load/layer_2", "expert_load/layer_10"}
    counts, edges = counts_and_edges(shares["expert_load/layer_2"])
    assert counts.tolist() == [500, 250, 0, 250] and edges.tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5]


class Tracker:
    """As much of wandb, or of trackio, as histograms need."""

    def __init__(self):
        self.rows = []

    def Histogram(self, values=None, np_histogram=None):  # noqa: N802
        """What it was made of."""
        return np.unique(values, return_counts=True) if np_histogram is None else np_histogram

    def log(self, row):
        """Keeps a row."""
        self.rows.append(row)


@pytest.mark.parametrize(("name", "attribute"), [("WandbCallback", "_wandb"), ("TrackioCallback", "_trackio")])
def test_trackers_are_given_histograms_at_the_step_of_the_scalars(name, attribute):
    tracker = Tracker()
    callback = type(name, (), {attribute: tracker})()
    shown = ExpertHistograms([callback, type("MLflowCallback", (), {})()])
    shown.on_log(None, STATE, None, logs=LOGS)
    shown.on_log(None, STATE, None, logs={"loss": 1.0})
    shown.on_log(None, SimpleNamespace(is_world_process_zero=False, global_step=8), None, logs=LOGS)
    (row,) = tracker.rows
    assert row["train/global_step"] == 7 and row.keys() == {
        "train/global_step",
        "train/expert_load/layer_2",
        "train/expert_load/layer_10",
    }
    counts = row["train/expert_load/layer_2"][0 if name == "WandbCallback" else 1]
    assert counts.tolist() == ([500, 250, 0, 250] if name == "WandbCallback" else [500, 250, 250])


def test_a_run_writes_histograms_and_scalars_for_tensorboard(flags_for, tmp_path):
    for stage in ("pretrain", "finetune", "moe"):
        short = {"max_steps": 2, "save_strategy": "no", "skip_dry_save": True, "report_to": "tensorboard"}
        folder = train_here(flags_for(tmp_path, stage) | short)
    (log,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(log), size_guidance={"histograms": 0})
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/expert_load/layer_0/expert_0"} <= set(tags["scalars"])
    seen = events.Histograms("histograms/expert_load/layer_0")
    assert [event.step for event in seen] == [1, 2]
    for event in seen:
        counts = [count for count in event.histogram_value.bucket if count]
        share = events.Scalars("train/expert_load/layer_0/expert_0")[event.step - 1].value
        assert len(counts) == 4 and counts[0] == pytest.approx(1000 * share, abs=1)


@pytest.mark.parametrize("name", [name for name in ("wandb", "mlflow", "trackio") if find_spec(name) is None])
def test_a_tracker_that_is_not_installed_is_named(name):
    base = ["--model_name_or_path", "lm", "--data_path", "a.json", "--output_dir", "out"]
    with pytest.raises(UserError, match=rf"--report_to {name}: .*pip install 'moellava\[{name}\]'"):
        parse_arguments([*base, "--report_to", name])
