# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run as PNG files: its numbers over time, and the load of its experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moellava.vis.colours import PALETTE
from moellava.vis.figures import NORMAL, SMALL, new_figure, save, ticks
from moellava.vis.run_files import Loads, Run, loads_of

GIGABYTE = 1e9


class Panel(NamedTuple):
    """Numbers that are drawn together.

    Attributes:
        title: in words, with the unit.
        lines: (event, name in the log, label).
        scale: what values are divided by.
    """

    title: str
    lines: Sequence[tuple[str, str, str]]
    scale: float = 1.0


PANELS = (
    Panel("loss", (("train", "loss", "training"), ("eval", "eval_loss", "evaluation"))),
    Panel("learning rate", (("train", "learning_rate", "learning rate"),)),
    Panel("norm of the gradient", (("train", "grad_norm", "norm"),)),
    Panel("tokens a second", (("train", "tokens_per_second", "tokens"),)),
    Panel("most memory, GB", (("train", "memory", "memory"),), GIGABYTE),
    Panel("router losses (balancing loss: 1 is even)", (("train", "aux", "balancing loss"), ("train", "z", "z-loss"))),
)
"""What is drawn of a run where its log tells of it; evaluations' other scores follow."""


def panels_of(run: Run) -> list[tuple[Panel, list[tuple[str, str, list[float], list[float]]]]]:
    """Panels that have numbers, with (label, event, steps, values) of each line."""
    scores = [name for name in run.scores() if name != "eval_loss"]
    others = [Panel(name.removeprefix("eval_"), (("eval", name, name.removeprefix("eval_")),)) for name in scores]
    found = []
    for panel in (*PANELS, *others):
        lines = [(label, event, *run.series(event, name)) for event, name, label in panel.lines]
        lines = [(label, event, x, [value / panel.scale for value in y]) for label, event, x, y in lines if x]
        if lines:
            found.append((panel, lines))
    return found


def draw_run(run: Run) -> Any:
    """Losses, learning rate, norm of the gradient, throughput and memory over the steps."""
    panels = panels_of(run)
    columns = min(3, max(len(panels), 1))
    rows = max(-(-len(panels) // columns), 1)
    figure = new_figure(4 * columns, 2.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    if not panels:
        axes[0].set_title("no step has been logged yet", fontsize=NORMAL)
    for axis, (panel, lines) in zip(axes, panels, strict=False):
        for (label, event, x, y), colour in zip(lines, PALETTE, strict=False):
            marker = "o" if event == "eval" or len(x) < 30 else None
            axis.plot(x, y, color=colour, label=label, linewidth=1.5, marker=marker, markersize=3)
        if panel.title != "loss":
            axis.set_ylim(0, 1.08 * max(max(y) for *_, y in lines) or 1)
        axis.set_title(panel.title, fontsize=NORMAL)
        axis.set_xlabel("step", fontsize=SMALL)
        axis.tick_params(labelsize=SMALL)
        axis.grid(color="#EEEEEE")
        if len(lines) > 1:
            axis.legend(fontsize=SMALL, frameon=False)
    return figure


def draw_experts(loads: Loads) -> Any:
    """The largest load of each layer over time, and the load of every expert at the last step."""
    last = [table[:, -1] for table in loads.of_layer]
    widest, layers = max(map(len, last)), len(loads.layers)
    figure = new_figure(13, min(max(2.6, 1.5 + 0.26 * layers), 9))
    left, right = figure.subplots(1, 2, sharey=True)
    table = np.full((layers, widest), np.nan)
    for number, row in enumerate(last):
        table[number, : len(row)] = row
    for axis, values, title, labels, across in (
        (left, loads.unevenness, "largest load of a layer over time", loads.steps, "step"),
        (right, table, f"load of each expert at step {loads.steps[-1]:,}", list(range(widest)), "expert"),
    ):
        image = axis.imshow(
            values,
            cmap="cividis",
            vmin=0,
            vmax=max(2.0, float(np.nanmax(values))),
            aspect="auto",
            interpolation="nearest",
        )
        axis.set_title(title, fontsize=NORMAL)
        axis.set_xlabel(across)
        ticks(axis.xaxis, labels, 10 if across == "step" else 16)
        bar = figure.colorbar(image, ax=axis)
        bar.set_label("load / even share")
    ticks(left.yaxis, [int(name) for name in loads.layers], 30)
    left.set_ylabel("layer")
    return figure


def write_run_figures(folder: Path, run: Run) -> list[Path]:
    """Writes run.png, and experts.png of a sparse model; returns the paths."""
    loads = loads_of(run)
    drawn = {"run": draw_run(run)} | ({"experts": draw_experts(loads)} if loads else {})
    return [save(figure, folder / f"{name}.png") for name, figure in drawn.items()]
