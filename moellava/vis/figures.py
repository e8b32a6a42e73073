# SPDX-License-Identifier: Apache-2.0
"""Pictures of routing as PNG files, readable at their size for one layer of two experts and for 24 of 64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from moellava.files import written
from moellava.vis.collect import Collected, Picture
from moellava.vis.colours import IMAGE, OTHERS, PALETTE, TEXT, coloured
from moellava.vis.measures import FACTORS, PARTS, Pathway, Summary
from moellava.vis.needed import pyplot
from moellava.vis.patches import Grid

DPI = 110
SMALL, NORMAL = 8, 10
"""Sizes of letters, in points."""

FEW = 8
"""Up to so many experts a cell has its number in it, and a colour means the same expert everywhere."""

MARKERS = ("o", "s", "^", "D", "v")

STRONG = (PALETTE[0], PALETTE[1], PALETTE[2])
"""Colours of the most frequent pathways."""

CAUGHT = 0.02
"""Share of a layer's tokens from which on a step between two layers is drawn behind the pathways."""


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches."""
    return pyplot()(figsize=(width, height), dpi=DPI, layout="constrained")


def save(figure: Any, path: Path) -> Path:
    """Writes a figure; a reader sees the old file or the new one."""
    with written(path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white")
    return path


def draw_load(seen: Collected, summary: Summary) -> Any:
    """Load of each expert of each layer, of image and of text tokens, as multiples of the even share."""
    parts = [name for name in ("image", "text") if summary.tokens[name]]
    widest, layers = max(seen.experts), len(seen.layers)
    cell = 0.55 if widest <= FEW else 0.16
    figure = new_figure(min(2.2 + len(parts) * (cell * widest + 0.9), 15), min(max(2.6, 1.6 + 0.32 * layers), 12))
    axes = figure.subplots(1, len(parts), squeeze=False, sharey=True)[0]
    tables = [padded(summary.load[name], seen.experts) for name in parts]
    top = max(2.0, max(float(np.nanmax(table)) for table in tables))
    image = None
    for axis, name, table in zip(axes, parts, tables, strict=True):
        image = axis.imshow(table, cmap="cividis", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        axis.set_title(f"{name} tokens ({summary.tokens[name]:,})", fontsize=NORMAL)
        axis.set_xlabel("expert")
        ticks(axis.xaxis, list(range(widest)), 16)
        ticks(axis.yaxis, seen.layers, 30)
        if widest <= FEW:
            for (row, column), value in np.ndenumerate(table):
                if not math.isnan(value):
                    shade = "black" if value > 0.55 * top else "white"
                    share = 100 * value / seen.experts[row]
                    axis.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=SMALL, color=shade)
    axes[0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=list(axes), shrink=0.9)
    bar.set_label("load / even share", fontsize=SMALL)
    unit = " (in the cells: % of the choices)" if widest <= FEW else ""
    figure.suptitle(f"Load of the experts{unit}", fontsize=NORMAL + 1)
    return figure


def padded(rows: list[np.ndarray], experts: list[int]) -> np.ndarray:
    """Shares [L, E] as multiples of the even one; NaN where a layer has fewer experts."""
    table = np.full((len(rows), max(experts)), np.nan)
    for number, (row, count) in enumerate(zip(rows, experts, strict=True)):
        table[number, :count] = row * count
    return table


def ticks(axis: Any, labels: list[int], most: int) -> None:
    """At most so many labelled ticks."""
    step = max(math.ceil(len(labels) / most), 1)
    places = list(range(0, len(labels), step))
    axis.set_ticks(places, [str(labels[place]) for place in places], fontsize=SMALL)


def draw_map(seen: Collected, picture: Picture) -> Any:
    """Which expert each patch of a picture went to, layer by layer: the first choice, on the picture in grey."""
    grid = max(picture.grids, key=lambda one: one.rows * one.columns)
    rows = np.array([picture.first + place for place, _, _ in grid.places()])
    columns = min(6, len(seen.layers) + 1)
    lines = math.ceil((len(seen.layers) + 1) / columns)
    is_few = max(seen.experts) <= FEW
    figure = new_figure(1.85 * columns + 0.9 * is_few, (2.05 if is_few else 2.3) * lines + 0.4)
    figure.get_layout_engine().set(hspace=0.02 if is_few else 0.09)
    axes = figure.subplots(lines, columns, squeeze=False).reshape(-1)
    for axis in axes:
        axis.set_axis_off()
    part = cut(picture, grid)
    axes[0].imshow(part)
    axes[0].set_title("shown", fontsize=SMALL + 1)
    for number, layer in enumerate(seen.layers):
        chosen = seen.expert_TLk[rows, number, 0].astype(int).reshape(grid.rows, grid.columns)
        colours = coloured(chosen.reshape(-1), seen.experts[number])
        draw_patches(axes[number + 1], part, chosen, colours)
        axes[number + 1].set_title(f"layer {layer}", fontsize=SMALL + 1)
        if seen.experts[number] > FEW:
            legend_below(axes[number + 1], colours)
    if is_few:
        legend(figure, coloured(np.zeros(0, dtype=int), max(seen.experts)))
    figure.suptitle(f"First expert of each patch ({grid.rows} × {grid.columns}, {grid.name})", fontsize=NORMAL)
    return figure


def cut(picture: Picture, grid: Grid) -> Any:
    """The part of a picture that a grid covers, all of it where that is not known."""
    left, top, right, bottom = grid.box or (0, 0, 1, 1)
    width, height = picture.image.size
    return picture.image.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))


def draw_patches(axis: Any, part: Any, chosen: np.ndarray, colours: dict[int, str]) -> None:
    """Cells in their experts' colours over a grey picture."""
    rows, columns = chosen.shape
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    axis.imshow(part.convert("L"), cmap="gray", vmin=0, vmax=255, extent=extent)
    shades = [[rgb(colours.get(int(expert), OTHERS)) for expert in row] for row in chosen]
    axis.imshow(np.array(shades), alpha=0.62, extent=extent, interpolation="nearest")
    axis.set_aspect(part.size[1] / part.size[0] * columns / rows)


def rgb(colour: str) -> tuple[float, float, float]:
    """'#0072B2' as three numbers from 0 to 1."""
    return tuple(int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))  # type: ignore[return-value]


def legend(figure: Any, colours: dict[int, str]) -> None:
    """Colours of experts beside all panels."""
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=f"expert {expert}", alpha=0.75) for expert, colour in colours.items()]
    figure.legend(handles=handles, loc="outside right center", fontsize=SMALL, frameon=False)


def legend_below(axis: Any, colours: dict[int, str]) -> None:
    """The experts that have a colour in one panel, below it; grey stands for all others."""
    shown = list(colours.items())
    for place, (expert, colour) in enumerate(shown):
        across = (place + 0.5) / len(shown)
        box = {"boxstyle": "square,pad=0.2", "facecolor": colour, "edgecolor": "none", "alpha": 0.75}
        axis.text(across, -0.1, str(expert), transform=axis.transAxes, fontsize=7, ha="center", va="center", bbox=box)


def draw_pathways(seen: Collected, summary: Summary) -> Any:
    """The most frequent pathways through the layers, of image and of text tokens; behind them, where tokens go."""
    layers, widest = len(seen.layers), max(seen.experts)
    parts = [name for name in ("image", "text") if summary.tokens[name]]
    height = min(max(2.4, 1.2 + 0.35 * widest), 5.5)
    figure = new_figure(min(max(7.5, 4 + 0.42 * layers), 14), height * len(parts))
    for axis, part in zip(figure.subplots(len(parts), 1, squeeze=False)[:, 0], parts, strict=True):
        first_TL = seen.expert_TLk[PARTS[part](seen), :, 0]
        for layer in range(layers - 1):
            for begin, end, share in steps_between(first_TL[:, layer : layer + 2]):
                axis.plot([layer, layer + 1], [begin, end], color="#E6E6E6", linewidth=14 * share)
        draw_paths(axis, summary.pathways[part])
        ticks(axis.xaxis, seen.layers, 30)
        ticks(axis.yaxis, list(range(widest)), 16)
        axis.set_xlim(-0.3, layers - 0.7)
        axis.set_ylim(widest - 0.4, -0.6)
        axis.set_ylabel("expert (first choice)")
        found = summary.pathways[part]
        together = 100 * sum(path.share for path in found)
        title = (
            f"{part} tokens: the {len(found)} most frequent of {summary.distinct[part]:,} pathways, {together:.1f} %"
        )
        axis.set_title(title, fontsize=NORMAL)
        axis.legend(fontsize=SMALL, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        axis.set_xlabel("layer")
    return figure


def draw_paths(axis: Any, paths: list[Pathway]) -> None:
    """Pathways as lines beside each other: the first in colours, the others thin."""
    step, others = 0.5 / max(len(paths), 1), f"{len(STRONG) + 1} to {len(paths)}"
    for rank, path in enumerate(paths):
        heights = [expert + (rank - (len(paths) - 1) / 2) * step for expert in path.experts]
        label = f"{rank + 1}: {100 * path.share:.1f} % of the tokens"
        if rank < len(STRONG):
            colour, marker, width = STRONG[rank], MARKERS[rank], 1.5 + 3 * path.share / paths[0].share
            axis.plot(heights, color=colour, linewidth=width, marker=marker, markersize=6, label=label, zorder=9 - rank)
        else:
            axis.plot(heights, color="#777777", linewidth=0.9, label=others if rank == len(paths) - 1 else None)
    axis.plot([], [], color="#D0D0D0", linewidth=5, label=f"steps of {100 * CAUGHT:.0f} % and more")


def steps_between(first_T2: np.ndarray) -> list[tuple[int, int, float]]:
    """(expert, expert of the next layer, share of tokens) of the steps that many tokens take."""
    pairs, counts = np.unique(first_T2, axis=0, return_counts=True)
    shares = counts / counts.sum()
    return [(int(a), int(b), float(share)) for (a, b), share in zip(pairs, shares, strict=True) if share >= CAUGHT]


def draw_specialisation(seen: Collected, summary: Summary) -> Any:
    """What experts are chosen by, how sure routers are, and what is dropped, layer by layer."""
    drops = any(summary.dropped)
    figure = new_figure(8, 5.4 + 1.8 * drops)
    axes = figure.subplots(2 + drops, 1, sharex=True, height_ratios=[3, 2, *([1.4] * drops)])
    places = range(len(seen.layers))
    for (name, factor), colour, marker in zip(FACTORS.items(), PALETTE, MARKERS, strict=False):
        if summary.bound[name] > 0:
            label = f"{factor.label} (at most {summary.bound[name]:.2f})"
            axes[0].plot(places, summary.information[name], color=colour, marker=marker, markersize=4, label=label)
    axes[0].set_ylabel("bits")
    axes[0].set_title("What the choice of an expert tells of a token (mutual information)", fontsize=NORMAL)
    axes[0].legend(fontsize=SMALL, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    for name, colour, marker in (("image", IMAGE, "s"), ("text", TEXT, "o")):
        if not all(math.isnan(value) for value in summary.entropy[name]):
            axes[1].plot(
                places, summary.entropy[name], color=colour, marker=marker, markersize=4, label=f"{name} tokens"
            )
    axes[1].plot(places, [math.log(count) for count in seen.experts], "--", color="#777777", label="any expert alike")
    axes[1].set_ylim(0, 1.1 * math.log(max(seen.experts)))
    axes[1].set_ylabel("nats")
    axes[1].set_title("Entropy of the router", fontsize=NORMAL)
    axes[1].legend(fontsize=SMALL, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    if drops:
        axes[2].bar(places, [100 * share for share in summary.dropped], color=PALETTE[5])
        axes[2].set_ylabel("%")
        axes[2].set_title("Choices dropped, their expert being full", fontsize=NORMAL)
    ticks(axes[-1].xaxis, seen.layers, 30)
    axes[-1].set_xlabel("layer")
    for axis in axes:
        axis.grid(color="#EEEEEE")
        axis.set_axisbelow(True)
    axes[0].set_ylim(bottom=0)
    return figure


def write_figures(folder: Path, seen: Collected, summary: Summary, pictures: int) -> list[Path]:
    """Writes load.png, pathways.png, specialisation.png, and a map for some of the pictures; returns the paths."""
    drawn = {
        "load": draw_load(seen, summary),
        "pathways": draw_pathways(seen, summary),
        "specialisation": draw_specialisation(seen, summary),
    }
    mapped = [picture for picture in seen.pictures if picture.grids][:pictures]
    drawn |= {f"map_{number}": draw_map(seen, picture) for number, picture in enumerate(mapped, start=1)}
    return [save(figure, folder / f"{name}.png") for name, figure in drawn.items()]
