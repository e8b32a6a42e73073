# SPDX-License-Identifier: Apache-2.0
"""Scores as sums over questions, with how sure they are.

Every score here is a function of sums over its questions: right answers by questions, or true positives, false
positives and false negatives by split. So its 95 % interval is the same for all: the jackknife that leaves out one
image at a time, with all questions about it (they are no independent draws). With θ the score, θ₋ᵢ the score without
image i, θ̄ their mean over n images:

    interval = θ ± 1.96 · sqrt((n - 1) / n · Σᵢ (θ₋ᵢ - θ̄)²)

(B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993, equation 11.5), and no wider than a score can be: that
of a share ends at 0 and 1. For a plain share of right answers about one image each the root is that of s² / n, to the
last digit. The difference of two models on the same questions takes both scores without the same image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moellava.errors import UserError
from moellava.registry import Registry

QUANTILE = 1.96
"""Of the normal distribution, for 95 %."""

FORMULA = "score ± 1.96 × jackknife standard error, one image with all its questions left out at a time"
WITHIN = f"{FORMULA}; within what the score can be"

Sums = NDArray[np.float64]


@dataclass(frozen=True)
class Item:
    """What one question adds to a score.

    Args:
        id: of the question.
        image: what its cluster is called.
        adds: summands, as many as the statistic reads.
        group: the part of a score that it belongs to: a split of POPE, a subtask of MME.
    """

    id: str
    image: str
    adds: tuple[float, ...]
    group: str = "all"


@dataclass(frozen=True)
class Statistic:
    """How a score comes from sums.

    Args:
        of: sums [..., K] of a group -> its score [...].
        most: what questions add [N, K] -> the greatest score of a group; the least is 0.
        across: how groups make one score: their mean or their sum.
        points: whether the score is a number of points, and no share of 1.
    """

    of: Callable[[Sums], Sums]
    most: Callable[[Sums], float]
    across: str = "mean"
    points: bool = False

    @property
    def scale(self) -> int:
        """What a score is multiplied by to be told: shares of 1 are told in points of 100."""
        return 1 if self.points else 100


def ratio(sums: Sums) -> Sums:
    """First sum by second: a mean, or one mean by another."""
    return sums[..., 0] / sums[..., 1]


def f1(sums: Sums) -> Sums:
    """F1 of true positives, false positives and false negatives: 2·tp / (2·tp + fp + fn); 0 where nothing is found."""
    return 2 * sums[..., 0] / np.maximum(2 * sums[..., 0] + sums[..., 1] + sums[..., 2], 1)


def mme_points(sums: Sums) -> Sums:
    """100 × accuracy + 100 × accuracy+, of right answers, questions, images with both right, images."""
    return 100 * sums[..., 0] / sums[..., 1] + 100 * sums[..., 2] / sums[..., 3]


STATISTICS: Registry[Statistic] = Registry("statistic")


def most_of_ratio(adds: Sums) -> float:
    """1 where no question adds more to the first sum than to the second; a judge's scores by a reference's may."""
    return 1.0 if (adds[..., 0] <= adds[..., 1]).all() else math.inf


STATISTICS["mean"] = Statistic(ratio, most_of_ratio)
STATISTICS["f1"] = Statistic(f1, lambda adds: 1.0)
STATISTICS["mme"] = Statistic(mme_points, lambda adds: 200.0, across="sum", points=True)


@dataclass(frozen=True)
class Tally:
    """What the questions of a benchmark add up to.

    Args:
        items: one a question.
        statistic: a name of `STATISTICS`.
    """

    items: Sequence[Item]
    statistic: str = "mean"

    @property
    def score(self) -> float:
        """The score; not a number where nothing was asked."""
        return float(self._scores(self.sums().sum(axis=1)))

    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval; None where there are not two images, or too few of one group."""
        found = around(self.score, deviation(self._without_each()))
        return found and (max(found[0], 0.0), min(found[1], self.most))

    @property
    def most(self) -> float:
        """The greatest score there can be."""
        statistic = STATISTICS[self.statistic]
        groups = len({item.group for item in self.items}) if statistic.across == "sum" else 1
        return groups * statistic.most(np.array([item.adds for item in self.items], dtype=float))

    def minus(self, other: Tally) -> tuple[float, tuple[float, float] | None]:
        """This score less another's on the same questions, and the 95 % interval of the difference.

        Raises:
            UserError: the two are not of the same questions, or not scored alike.
        """
        if self.statistic != other.statistic:
            raise UserError(f"--against: the other score is a {other.statistic}, this one a {self.statistic}.")
        mine, theirs = ({(item.id, item.image, item.group) for item in tally.items} for tally in (self, other))
        if len(self.items) != len(other.items) or mine != theirs:
            raise UserError(
                f"--against: the other score is of {len(other.items)} questions, this one of {len(self.items)}, and "
                f"{len(mine & theirs)} are the same. Score both on the same task, --split, --limit and --seed."
            )
        difference = self.score - other.score
        return difference, around(difference, deviation(self._without_each() - other._without_each()))

    def sums(self) -> Sums:
        """[groups, images, K]; images and groups in the order of their names."""
        groups = {name: place for place, name in enumerate(sorted({item.group for item in self.items}))}
        images = {name: place for place, name in enumerate(sorted({item.image for item in self.items}))}
        width = len(self.items[0].adds) if self.items else 2
        sums = np.zeros((max(len(groups), 1), max(len(images), 1), width))
        at = ([groups[item.group] for item in self.items], [images[item.image] for item in self.items])
        if self.items:
            np.add.at(sums, at, np.array([item.adds for item in self.items], dtype=float))
        return sums

    def _scores(self, sums: Sums) -> Sums:
        """sums [groups, ..., K] -> scores [...]."""
        statistic = STATISTICS[self.statistic]
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = statistic.of(sums)
        return parts.sum(axis=0) if statistic.across == "sum" else parts.mean(axis=0)

    def _without_each(self) -> Sums:
        """The score without each image [images]."""
        sums = self.sums()
        return self._scores(sums.sum(axis=1, keepdims=True) - sums)


def deviation(without: Sums) -> float:
    """The jackknife's standard error of a score, from the scores without each image; not a number if it has none."""
    count = len(without)
    if count < 2:
        return math.nan
    return float(np.sqrt((count - 1) / count * np.square(without - without.mean()).sum()))


def around(value: float, error: float) -> tuple[float, float] | None:
    """The 95 % interval of a value with a standard error; None where it has none."""
    if not math.isfinite(value) or not math.isfinite(error):
        return None
    return value - QUANTILE * error, value + QUANTILE * error


def shares(names: Sequence[str], values: Sequence[float]) -> dict[str, dict[str, float]]:
    """name -> accuracy (mean of the values of that name) and questions, in the order of the names."""
    found: dict[str, list[float]] = {}
    for name, value in zip(names, values, strict=True):
        found.setdefault(name, []).append(float(value))
    return {name: {"accuracy": sum(kept) / len(kept), "total": len(kept)} for name, kept in sorted(found.items())}
