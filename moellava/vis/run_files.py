# SPDX-License-Identifier: Apache-2.0
"""What the folder of a run tells of it, finished or not: its log, what trained, the certificate, its flags.

Legend: S log steps, L sparse layers, E experts of a layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moellava.errors import UserError
from moellava.files import read_object
from moellava.moe.certificate import FILE, Certificate

RUN_LOG = "run_log.jsonl"
STATE = "trainer_state.json"

DIGITS = 5
"""Significant digits of a number in the log."""

NOT_SCORES = ("runtime", "samples_per_second", "steps_per_second")
"""Ends of the names of what an evaluation took, which are no scores."""

POINTS = 400
"""Most points of a line; of more, means of neighbours are drawn."""

COLUMNS = 60
"""Most log steps whose loads are drawn."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; what a kill has left of half a line is dropped. Empty where there is no such file."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def nested(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Log keys of the Trainer -> a line: statistics of routers under `layers`, by the layer's index."""
    line: dict[str, Any] = {}
    layers: dict[int, dict[str, Any]] = {}
    for key, value in logs.items():
        name, _, rest = key.partition("/")
        if not rest.startswith("layer_"):
            line[key] = rounded(value)
            continue
        index, _, expert = rest.partition("/")
        layer = layers.setdefault(int(index.removeprefix("layer_")), {})
        name = name.removeprefix("expert_").removeprefix("router_")
        if expert:
            layer.setdefault(name, {})[int(expert.removeprefix("expert_"))] = rounded(value)
        else:
            layer[name] = rounded(value)
    ordered = {
        str(index): {name: _in_order(value) for name, value in layers[index].items()} for index in sorted(layers)
    }
    return line | ({"layers": ordered} if ordered else {})


def _in_order(value: Any) -> Any:
    """The numbers of experts as a list; trainer_state.json has its keys in the order of the alphabet."""
    return [value[expert] for expert in sorted(value)] if isinstance(value, dict) else value


def rounded(value: Any) -> Any:
    """A number with `DIGITS` digits; None for one that JSON cannot hold; anything else as it is."""
    if isinstance(value, bool | int | str | list | dict) or value is None:
        return value
    number = float(value)
    return float(f"{number:.{DIGITS}g}") if math.isfinite(number) else None


@dataclass
class Run:
    """A run.

    Attributes:
        folder: its folder.
        lines: of its log.
        parameters: part -> numbers of trainable and frozen parameters; empty where it is not known.
        certificate: lines about what upcycling changed; empty where nothing was upcycled.
        flags: that make the run what it is, by name.
        finished: whether it has come to its end.
    """

    folder: Path
    lines: list[dict[str, Any]]
    parameters: dict[str, dict[str, int]]
    certificate: list[str]
    flags: dict[str, Any]
    finished: bool

    def of(self, event: str) -> list[dict[str, Any]]:
        """The lines of an event."""
        return [line for line in self.lines if line.get("event") == event]

    @property
    def start(self) -> dict[str, Any]:
        """The first line; {} where the log has none."""
        return next(iter(self.of("start")), {})

    def series(self, event: str, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a number, as many as are drawn."""
        rows = [(line["step"], line[name]) for line in self.of(event) if isinstance(line.get(name), int | float)]
        size = max(math.ceil(len(rows) / POINTS), 1)
        groups = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
        return [group[-1][0] for group in groups], [float(np.mean([value for _, value in group])) for group in groups]

    def scores(self) -> list[str]:
        """Names of what evaluations found."""
        names = {name for line in self.of("eval") for name in line if name.startswith("eval_")}
        return sorted(name for name in names if not name.endswith(NOT_SCORES))


@dataclass
class Loads:
    """Load of experts over time.

    Attributes:
        steps: S, those that are drawn.
        layers: indices of the sparse layers, as text.
        of_layer: for each layer [E, S], multiples of the even share.
        dead: [L, S], experts that no token chose.
    """

    steps: list[int]
    layers: list[str]
    of_layer: list[np.ndarray]
    dead: np.ndarray

    @property
    def unevenness(self) -> np.ndarray:
        """[L, S], the largest load of a layer as a multiple of the even share."""
        return np.stack([table.max(0) for table in self.of_layer])


def loads_of(run: Run) -> Loads | None:
    """The loads that a run's log tells; None for a dense model."""
    lines = [line for line in run.of("train") if line.get("layers")]
    if not lines:
        return None
    places = np.unique(np.linspace(0, len(lines) - 1, min(COLUMNS, len(lines))).round().astype(int))
    shown = [lines[place] for place in places]
    layers = list(shown[-1]["layers"])
    shares = [np.array([line["layers"][name]["load"] for line in shown]).T for name in layers]
    tables = [table * len(table) for table in shares]
    dead = np.array([[line["layers"][name].get("dead", 0) for line in shown] for name in layers])
    return Loads([line["step"] for line in shown], layers, tables, dead)


def open_run(folder: Path) -> Run:
    """A run's folder. Raises UserError: it holds none, or damaged files."""
    lines = read_lines(folder / RUN_LOG) or list(_from_state(folder / STATE))
    if not lines:
        raise UserError(f"{folder} holds no run: there is neither {RUN_LOG} nor {STATE} with a line of a log.")
    certificate = read_object(folder / FILE)
    stored = read_object(folder / "run.json")
    return Run(
        folder=folder,
        lines=lines,
        parameters=read_object(folder / "parameters.json"),
        certificate=Certificate(**certificate).lines() if certificate else [],
        flags=stored.get("identity", {}),
        finished=bool(stored.get("finished")),
    )


def _from_state(path: Path) -> Iterator[dict[str, Any]]:
    """Lines as the Trainer keeps them, of a run that has no log of ours."""
    for logs in read_object(path).get("log_history", []):
        if "train_runtime" not in logs:
            event = "eval" if any(key.startswith("eval_") for key in logs) else "train"
            yield {"event": event} | nested(logs)


def facts_of(run: Run) -> list[tuple[str, str]]:
    """What a run is, in words: (name, text)."""
    begin, steps = run.start, max(line.get("step", 0) for line in run.lines)
    planned = begin.get("steps", run.flags.get("--max_steps"))
    facts = [
        ("folder", str(run.folder)),
        ("stage", str(begin.get("stage", run.flags.get("stage", "unknown")))),
        ("steps", f"{steps:,}{f' of {planned:,}' if isinstance(planned, int) and planned > 0 else ''}"),
        ("processes", str(begin.get("processes", run.flags.get("processes", "unknown")))),
        ("state", "finished" if run.finished else "not finished"),
    ]
    sums: dict[str, Any] = next((line for line in reversed(run.lines) if "elapsed" in line), {})
    if sums:
        seconds = max(sums["training"], 1e-9)
        facts += [
            ("samples", f"{sums['samples']:,.0f} ({sums['samples'] / seconds:,.2f} a second of training)"),
            ("tokens", f"{sums['tokens']:,.0f} ({sums['tokens'] / seconds:,.0f} a second of training)"),
            ("time", f"{sums['elapsed']:,.0f} s, of which {sums['training']:,.0f} s of training"),
            ("peak memory", f"{sums['memory'] / 1e9:.1f} GB (of the first process)"),
        ]
    goes_on = len(run.of("start")) - 1
    if goes_on > 0:
        facts.append(("went on", f"{goes_on} times, after a stop"))
    return facts


def shown_flags(flags: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Flags that were set to something, as text."""
    return [(name, str(value)) for name, value in flags.items() if value not in (None, False, "", [], {})]
