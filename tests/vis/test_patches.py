# SPDX-License-Identifier: Apache-2.0
"""Where tokens lie in an image, for runs of every layout; and classes of words."""

from __future__ import annotations

import pytest

from moellava.vis.patches import WHOLE, Grid, Shown, grids_of, stretches_of
from moellava.vis.words import word_classes

SQUARE = Shown((640, 480))


def run(*parts: int | str) -> tuple[list[bool], list[str]]:
    """A run of so many tokens of the image, and others by their texts."""
    is_patch, texts = [], []
    for part in parts:
        count = part if isinstance(part, int) else 1
        is_patch += [isinstance(part, int)] * count
        texts += ["<image>" if isinstance(part, int) else part] * count
    return is_patch, texts


def grids(shown: Shown, *parts: int | str) -> list[Grid]:
    return grids_of(stretches_of(*run(*parts)), shown)


def test_a_square_is_rows_of_as_many():
    (grid,) = grids(SQUARE, 576)
    assert grid == Grid(24, 24, 0, 24, WHOLE) and grid.places()[25] == (25, 1, 1)
    assert grids(SQUARE, "<start>", 256, "<end>") == [Grid(16, 16, 1, 16)]


def test_a_class_token_stands_before_the_patches():
    assert grids(SQUARE, 577) == [Grid(24, 24, 1, 24)]


def test_a_tower_may_be_higher_than_wide():
    assert grids(Shown((640, 480), shape=(12, 8)), 96) == [Grid(12, 8, 0, 8)]
    assert grids(Shown((640, 480), shape=(12, 8)), 100) == [Grid(12, 8, 4, 8)]


def test_a_grid_that_is_stated_is_taken():
    assert grids(Shown((640, 480), frames=(1, 6, 8)), "<v>", 48, "</v>") == [Grid(6, 8, 1, 8)]
    frames = grids(Shown((640, 480), frames=(2, 3, 4)), 24)
    assert [(one.rows, one.first, one.name) for one in frames] == [(3, 0, "frame 1 of 2"), (3, 12, "frame 2 of 2")]
    apart = grids(Shown((640, 480), frames=(2, 3, 4)), "0s", 12, "1s", 12)
    assert [one.first for one in apart] == [1, 14]
    assert grids(Shown((640, 480), frames=(1, 6, 8)), 47) == []


def test_rows_that_end_with_a_break():
    parts = [part for _ in range(6) for part in (8, "[BREAK]")][:-1] + ["[END]"]
    (grid,) = grids(SQUARE, *parts)
    assert grid == Grid(6, 8, 0, 9) and grid.places()[8] == (9, 1, 0)


def test_tiles_that_are_named():
    parts = [part for row in (1, 2) for column in (1, 2, 3) for part in (f"<row_{row}_col_{column}>", 16)]
    found = grids(SQUARE, *parts, "<global-img>", 16)
    assert len(found) == 7 and found[-1].box == WHOLE
    assert found[4].box == pytest.approx((1 / 3, 0.5, 2 / 3, 1)) and found[4].name == "tile in row 2, column 2"
    assert found[4].first == 5 + 4 * 16


def test_tiles_put_together_and_unpadded():
    """640 × 480 in 2 × 2 tiles of 24 × 24: 48 columns, 36 rows, each with a newline."""
    whole, fine = grids(Shown((640, 480), tile=576, unpads=True), 576 + 36 * 49)
    assert (whole.rows, whole.columns, whole.first) == (24, 24, 0)
    assert (fine.rows, fine.columns, fine.first, fine.pitch) == (36, 48, 576, 49)
    high = grids(Shown((300, 900), tile=576, unpads=True), 576 + 72 * 25)[1]
    assert (high.rows, high.columns) == (72, 24)


def test_tiles_in_a_row_have_no_known_place():
    found = grids(Shown((640, 480), tile=256), "<img>", 4 * 256, "</img>")
    assert [one.first for one in found] == [1, 257, 513, 769] and {one.box for one in found} == {None}
    assert grids(Shown((640, 480), tile=256), 256) == [Grid(16, 16, 0, 16)]


@pytest.mark.parametrize("length", [3, 7, 600, 1])
def test_what_is_no_grid_is_none(length):
    assert grids(SQUARE, length) == []


def test_words_have_classes():
    texts = ["<s>", "The", " cat", "s", " saw", " 12", ".", "5", " x", "\n", "What", "?", " New", "ton"]
    found = list(word_classes(texts, [True, *[False] * 13]))
    assert found == [
        *("special", "name", "word", "part of a word", "word", "number", "punctuation", "number", "word", "space"),
        *("name", "punctuation", "name", "part of a word"),
    ]
