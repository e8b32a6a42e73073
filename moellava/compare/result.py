# SPDX-License-Identifier: Apache-2.0
"""What a comparison found: one object that the table, the picture and the JSON show."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Difference:
    """A difference of two accuracies over the same questions, in fractions.

    Args:
        mean: of the right answers, this minus the other.
        low, high: ends of its 95 % interval.
    """

    mean: float
    low: float
    high: float

    def points(self, scale: int = 100) -> str:
        """In points of a hundred, or as `scale` says: `+0.55 [+0.21, +0.89]`."""
        return f"{scale * self.mean:+.2f} [{scale * self.low:+.2f}, {scale * self.high:+.2f}]"

    @property
    def verdict(self) -> str:
        """In words."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference that these questions show"


@dataclass(frozen=True)
class Lead:
    """How far one arm is before another.

    Args:
        arm, over: their names.
        difference: the first minus the second.
    """

    arm: str
    over: str
    difference: Difference


@dataclass
class ArmResult:
    """One arm, all seeds.

    Args:
        title: in words.
        accuracy: of each seed.
        by_category: accuracy of each category of questions, mean over the seeds; empty where there is one.
        steps: optimizer steps.
        flops: of all steps; None for what has not been trained here.
        seconds: of the steps at the speed that was logged.
        bytes: of the weights on disk.
        trained: numbers that trained.
        gain: against stage 2.
    """

    title: str
    accuracy: list[float]
    by_category: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    flops: float | None = None
    seconds: float = 0.0
    bytes: int = 0
    trained: int = 0
    gain: Difference | None = None

    @property
    def mean(self) -> float:
        """Accuracy, mean over the seeds."""
        return fmean(self.accuracy)


@dataclass
class Comparison:
    """Everything that is told.

    Args:
        task: what was asked.
        questions: how many.
        clusters: how many pictures they are about.
        arms: name -> result, stage 2 first.
        leads: of the sparse arm over each control, and of its variants over the first.
        routing: intervention -> (what it does, accuracy of each seed, difference to the model as it is).
        settings: flags, seeds and versions.
        scale: what scores are multiplied by to be told: 100, but for scores that are no shares of 1.
    """

    task: str
    questions: int
    clusters: int
    arms: dict[str, ArmResult] = field(default_factory=dict)
    leads: list[Lead] = field(default_factory=list)
    routing: dict[str, tuple[str, list[float], Difference]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    scale: int = 100

    def to_json(self) -> dict[str, Any]:
        """As nested dictionaries, for `compare.json`."""
        routing = {
            name: {"says": says, "accuracy": each, "difference": asdict(difference)}
            for name, (says, each, difference) in self.routing.items()
        }
        return {**asdict(self), "routing": routing}

    def lines(self) -> list[str]:
        """The table, and what it says."""
        return [*self._table(), "", *self._parts(), *self._verdicts(), "", *self._routing()]

    def _table(self) -> list[str]:
        of = "" if self.scale == 1 else f" of {self.scale}"
        head = f"{'':20}{'accuracy':>10}{'seeds':>16}{'gain on stage 2':>26}{'steps':>8}{'PFLOP':>9}{'s':>8}{'MB':>8}"
        lines = [f"{self.task}: {self.questions:,} questions about {self.clusters:,} pictures; points{of}", head]
        for arm in self.arms.values():
            each = " ".join(f"{self.scale * one:.2f}" for one in arm.accuracy) if len(arm.accuracy) > 1 else ""
            gain = arm.gain.points(self.scale) if arm.gain else ""
            flops = f"{arm.flops / 1e15:9.3g}" if arm.flops else " " * 9
            lines.append(
                f"{arm.title:20}{self.scale * arm.mean:10.2f}{each:>16}{gain:>26}{arm.steps or '':>8}{flops}"
                f"{f'{arm.seconds:.0f}' if arm.seconds else '':>8}{arm.bytes / 1e6:8.1f}"
            )
        return lines

    def _verdicts(self) -> list[str]:
        return [
            f"{self.arms[lead.arm].title} against {self.arms[lead.over].title}: "
            f"{lead.difference.points(self.scale)}: {lead.difference.verdict}"
            for lead in self.leads
        ]

    def _parts(self) -> list[str]:
        """A row an arm, a column a category; nothing where all questions are of one."""
        names = list(next(iter(self.arms.values())).by_category)
        if not names:
            return []
        lines = [f"{'by category':20}" + "".join(f"{name[:11]:>13}" for name in names)]
        for arm in self.arms.values():
            lines.append(f"{arm.title:20}" + "".join(f"{self.scale * arm.by_category[name]:13.2f}" for name in names))
        return [*lines, ""]

    def _routing(self) -> list[str]:
        if not self.routing:
            return []
        return ["What routing is worth: the sparse model with"] + [
            f"  {says:48} {difference.points(self.scale)}" for says, _, difference in self.routing.values()
        ]
