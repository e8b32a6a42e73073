# SPDX-License-Identifier: Apache-2.0
"""The picture of a comparison: each arm's gain on stage 2, and what the sparse model loses by each intervention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moellava.compare.result import Comparison, Difference

INK, SPARSE_INK, GRID = "#4d4d4d", "#0072b2", "#d9d9d9"
"""Colours that all readers tell apart (Okabe and Ito); what they mean is also said in words."""


def draw(found: Comparison, path: Path) -> None:
    """Writes a PNG.

    Args:
        found: with at least one arm beside stage 2.
        path: the file.
    """
    from matplotlib.figure import Figure

    arms = [(arm.title, arm.gain) for arm in found.arms.values() if arm.gain is not None]
    routing = [(says, difference) for says, _, difference in found.routing.values()]
    sparse = {found.arms[lead.arm].title for lead in found.leads}
    panels: list[tuple[str, list[tuple[str, Difference]]]] = [("Gain on stage 2, in points", arms)]
    if routing:
        panels.append(("What the MoE loses or gains with …, in points", routing))
    rows = [len(entries) for _, entries in panels]
    figure = Figure(figsize=(8, 1.3 * len(panels) + 0.34 * sum(rows)), layout="constrained", dpi=120)
    axes: Any = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[count + 1 for count in rows])
    for axis, (title, entries) in zip(axes[:, 0], panels, strict=True):
        _panel(axis, title, entries, found.scale, sparse)
    figure.suptitle(f"{found.task}: {found.questions:,} questions; bars are 95 % intervals", fontsize=11)
    figure.savefig(path)


def _panel(axis: Any, title: str, entries: Sequence[tuple[str, Difference]], scale: int, sparse: set[str]) -> None:
    """Points with intervals, one a row, the first on top; those of sparse arms in another colour."""
    for row, (name, difference) in enumerate(entries):
        low, mean, high = (scale * value for value in (difference.low, difference.mean, difference.high))
        ink = SPARSE_INK if name in sparse else INK
        axis.errorbar(mean, row, xerr=[[mean - low], [high - mean]], fmt="o", color=ink, capsize=4, markersize=6)
        axis.annotate(f"{mean:+.2f}", (mean, row), (0, 7), textcoords="offset points", ha="center", fontsize=9)
    axis.set_yticks(range(len(entries)), [name for name, _ in entries], fontsize=9)
    axis.set_ylim(len(entries) - 0.4, -0.8)
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.grid(axis="x", color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.set_title(title, fontsize=10, loc="left")
