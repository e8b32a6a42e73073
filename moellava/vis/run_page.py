# SPDX-License-Identifier: Apache-2.0
"""The page of `moellava report`: one run in one file."""

from __future__ import annotations

from typing import Any

from moellava.vis.colours import PALETTE
from moellava.vis.page import escaped, page, table
from moellava.vis.run_figures import panels_of
from moellava.vis.run_files import Run, facts_of, loads_of, shown_flags

SAMPLES = 12
"""Sample answers that are shown, the last ones first."""


def run_page(run: Run) -> str:
    """The page."""
    loads = loads_of(run)
    sections = [
        table(["", ""], facts_of(run)),
        "<h2>Over the steps</h2>",
        '<p class="note">Point at a chart for its numbers.</p><div class="row" id="charts"></div>',
        EXPERTS if loads else "",
        samples(run),
        trained(run),
        f"<h2>Certificate of the upcycling</h2><pre>{escaped(lines(run.certificate))}</pre>" if run.certificate else "",
        data_counts(run),
        versions(run),
    ]
    return page(f"Run: {run.folder.name}", "\n".join(filter(None, sections)), page_data(run), "run.js")


EXPERTS = """<h2>Experts over time</h2>
<p class="note">Above: the largest load of each layer, as a multiple of the even share; click a row to see its experts
below.</p>
<div id="layers"></div>
<div class="bar"><label>layer <input type="range" id="layer" min="0" step="1"> <b id="name"></b></label></div>
<div id="experts"></div>"""


def lines(texts: list[str]) -> str:
    """Lines of a text."""
    return "\n".join(texts)


def page_data(run: Run) -> dict[str, Any]:
    """What the page draws."""
    charts = []
    for panel, drawn in panels_of(run):
        steps = sorted({step for _, _, x, _ in drawn for step in x})
        series = [
            {
                "name": label,
                "y": [dict(zip(x, y, strict=True)).get(step) for step in steps],
                "colour": colour,
                "points": event == "eval",
            }
            for (label, event, x, y), colour in zip(drawn, PALETTE, strict=False)
        ]
        charts.append({"title": panel.title, "x": steps, "series": series, "zero": panel.title != "loss"})
    loads = loads_of(run)
    shown: dict[str, Any] = {"charts": charts}
    if loads is not None:
        shown["loads"] = {
            "steps": loads.steps,
            "layers": loads.layers,
            "unevenness": loads.unevenness,
            "dead": loads.dead,
            "of_layer": loads.of_layer,
        }
    return shown


def samples(run: Run) -> str:
    """Answers during training, the last ones first."""
    rows = [
        (line["step"], line["record"], line["prompt"], line["answer"], line["reference"])
        for line in reversed(run.of("sample"))
    ][:SAMPLES]
    return "<h2>Sample answers</h2>" + table(["step", "record", "prompt", "answer", "right"], rows) if rows else ""


def trained(run: Run) -> str:
    """What trained, and what was frozen."""
    if not run.parameters:
        return ""
    rows = [(name, row["trainable"], row["frozen"]) for name, row in run.parameters.items()]
    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    return "<h2>What trained</h2>" + table(["part", "trainable", "frozen"], rows)


def data_counts(run: Run) -> str:
    """What became of the records of each data set."""
    counted = run.start.get("data", {})
    names = list(dict.fromkeys(name for counts in counted.values() for name in counts))
    rows = [(called, *(counts.get(name, 0) for name in names)) for called, counts in counted.items()]
    return "<h2>Data</h2>" + table(["", *(name.replace("_", " ") for name in names)], rows) if rows else ""


def versions(run: Run) -> str:
    """Versions, and the flags of the run."""
    found = run.start.get("versions", {})
    parts = ["<h2>Versions</h2>" + table(["", ""], list(found.items()))] if found else []
    if run.flags:
        flags = table(["", ""], shown_flags(run.flags))
        parts.append(f"<h2>Flags</h2><details><summary>that make this run what it is</summary>{flags}</details>")
    return "".join(parts)
