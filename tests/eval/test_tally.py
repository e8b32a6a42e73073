# SPDX-License-Identifier: Apache-2.0
"""Scores as sums, and how sure they are."""

from __future__ import annotations

import math
import random
from statistics import fmean, variance

import numpy as np
import pytest

from moellava.errors import UserError
from moellava.eval.tally import QUANTILE, Item, Tally, around, deviation, f1, shares


def items(values, images=None, group="all"):
    """One question with each value, about an image each unless they are given."""
    images = images or [f"{place}.png" for place in range(len(values))]
    return [Item(str(place), image, (value, 1.0), group) for place, (value, image) in enumerate(zip(values, images))]


def half_width(interval):
    return (interval[1] - interval[0]) / 2


def test_a_share_with_one_question_an_image_has_the_textbook_interval():
    values = [random.Random(0).random() for _ in range(40)]
    tally = Tally(items(values))
    assert tally.score == pytest.approx(fmean(values))
    low, high = tally.interval()
    assert (low + high) / 2 == pytest.approx(tally.score)
    assert half_width((low, high)) == pytest.approx(QUANTILE * math.sqrt(variance(values) / len(values)))


@pytest.mark.parametrize(
    ("statistic", "adds", "most"),
    [
        ("mean", [(1.0, 1.0)] * 19 + [(0.0, 1.0)], 1.0),
        ("f1", [(1.0, 0.0, 0.0)] * 19 + [(0.0, 1.0, 0.0)], 1.0),
        ("mme", [(2.0, 2.0, 1.0, 1.0)] * 19 + [(1.0, 2.0, 0.0, 1.0)], 200.0),
    ],
)
def test_an_interval_ends_where_the_score_can(statistic, adds, most):
    made = [Item(str(place), f"{place}.png", some) for place, some in enumerate(adds)]
    low, high = Tally(made, statistic).interval()
    assert low < Tally(made, statistic).score < high == most
    in_two = [*made, *(Item(f"b{item.id}", item.image, item.adds, "b") for item in made)]
    assert Tally(in_two, statistic).interval()[1] == (2 * most if statistic == "mme" else most)
    none = [Item(item.id, item.image, (0.0, *item.adds[1:])) for item in made]
    assert statistic != "mean" or Tally(none, statistic).interval() == (0.0, 0.0)


def test_a_judges_scores_may_be_more_than_the_references():
    made = [Item(str(place), f"{place}.png", (8.0 + place % 2, 8.0)) for place in range(9)]
    low, high = Tally(made).interval()
    assert low > 1.0 and high > Tally(made).score


def test_asking_the_same_twice_makes_no_score_surer():
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    once = Tally(items(values))
    images = [f"{place % 6}.png" for place in range(12)]
    twice = Tally(items(values * 2, images))
    assert twice.score == once.score
    assert twice.interval() == pytest.approx(once.interval())
    apart = Tally(items(values * 2))
    assert half_width(apart.interval()) < 0.8 * half_width(once.interval())


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Questions about an image are right together: 95 of 100 intervals hold the truth, not as few as if they were
    drawn one by one."""
    drawn = np.random.default_rng(0)
    held = 0
    for _ in range(80):
        skill = drawn.uniform(0, 1, 60)
        values = (drawn.random((60, 8)) < skill[:, None]).astype(float)
        names = [str(image) for image in range(60) for _ in range(8)]
        low, high = Tally(items(values.ravel().tolist(), names)).interval()
        held += low <= 0.5 <= high
    assert 72 <= held <= 79


def test_groups_are_means_or_sums_of_their_scores():
    half = items([1.0, 0.0], group="a") + items([1.0, 1.0], group="b")
    assert Tally(half).score == 0.75
    points = [Item("1", "x", (2.0, 2.0, 1.0, 1.0), "a"), Item("2", "y", (1.0, 2.0, 0.0, 1.0), "b")]
    assert Tally(points, "mme").score == 200 + 50


@pytest.mark.parametrize(("sums", "score"), [((2, 1, 1), 2 / 3), ((0, 0, 0), 0), ((0, 3, 2), 0), ((5, 0, 0), 1)])
def test_f1_by_hand(sums, score):
    assert f1(np.array(sums, dtype=float)) == pytest.approx(score)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_too_few_images_have_no_interval(values):
    assert Tally(items(values)).interval() is None


def test_a_group_of_one_image_has_no_interval():
    assert Tally(items([1.0, 0.0], group="a") + items([1.0], group="b")).interval() is None


def test_the_difference_is_paired():
    """Two models that are right about the same questions differ by less than each is unsure."""
    first = [float(place % 3 > 0) for place in range(60)]
    second = list(first)
    second[0] = 1.0 - second[0]
    difference, (low, high) = Tally(items(second)).minus(Tally(items(first)))
    assert difference == pytest.approx(1 / 60)
    gaps = [b - a for a, b in zip(first, second, strict=True)]
    assert half_width((low, high)) == pytest.approx(QUANTILE * math.sqrt(variance(gaps) / 60))
    assert half_width((low, high)) < 0.3 * half_width(Tally(items(first)).interval())
    assert Tally(items(first)).minus(Tally(items(first))) == (0, (0, 0))


def test_only_the_same_questions_are_compared():
    with pytest.raises(UserError, match="of 2 questions, this one of 3, and 2 are the same"):
        Tally(items([1, 0, 1])).minus(Tally(items([1, 0])))
    with pytest.raises(UserError, match="is a f1, this one a mean"):
        Tally(items([1])).minus(Tally(items([1]), "f1"))


def test_what_is_no_number_has_no_interval():
    assert around(math.nan, 0.1) is None
    assert math.isnan(deviation(np.array([1.0])))


def test_shares_by_name():
    assert shares(["b", "a", "b"], [1, 0, 0]) == {
        "a": {"accuracy": 0.0, "total": 1},
        "b": {"accuracy": 0.5, "total": 2},
    }
