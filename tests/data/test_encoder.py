"""How much of a sample fits: images, what encloses them, and videos stay whole."""

from __future__ import annotations

import pytest

from moellava.constants import IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX
from moellava.data.encoder import Example, MediaSpan, fitting
from moellava.data.records import Medium

FIRST, SECOND, CLIP = Medium("image", "first"), Medium("image", "second"), Medium("video", "clip")
ONE_IMAGE = {IMAGE_TOKEN_INDEX: [MediaSpan(FIRST, 1, 3)], VIDEO_TOKEN_INDEX: []}
"""An image of three positions."""


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, (4, 6, [FIRST])),
        (6, (4, 6, [FIRST])),
        (5, (3, 5, [FIRST])),
        (4, (2, 4, [FIRST])),
        (3, (1, 1, [])),
        (1, (1, 1, [])),
        (0, (0, 0, [])),
    ],
)
def test_an_image_fits_whole_or_not_at_all(limit, expected):
    assert fitting([7, IMAGE_TOKEN_INDEX, 8, 9], ONE_IMAGE, limit) == expected


@pytest.mark.parametrize(("limit", "expected"), [(4, (0, 0, [])), (5, (3, 5, [FIRST])), (6, (4, 6, [FIRST]))])
def test_what_encloses_an_image_belongs_to_it(limit, expected):
    assert fitting([70, IMAGE_TOKEN_INDEX, 71, 8, 9], ONE_IMAGE, limit, around=(1, 1)) == expected


@pytest.mark.parametrize("limit", range(10))
def test_frames_of_a_video_are_cut_together(limit):
    """Two frames of two positions each, a word, and an image of three."""
    spans = {IMAGE_TOKEN_INDEX: [MediaSpan(CLIP, 2, 2), MediaSpan(SECOND, 1, 3)], VIDEO_TOKEN_INDEX: []}
    ends = {0: (0, 0, []), 4: (2, 4, [CLIP]), 5: (3, 5, [CLIP]), 8: (4, 8, [CLIP, SECOND])}
    found = fitting([IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX, 8, IMAGE_TOKEN_INDEX], spans, limit)
    assert found == ends[max(end for end in ends if end <= limit)]


def test_media_come_in_the_order_of_their_placeholders():
    spans = {IMAGE_TOKEN_INDEX: [MediaSpan(FIRST, 1, 3)], VIDEO_TOKEN_INDEX: [MediaSpan(CLIP, 1, 5)]}
    assert fitting([VIDEO_TOKEN_INDEX, 7, IMAGE_TOKEN_INDEX], spans, None) == (3, 9, [CLIP, FIRST])


def test_an_example_without_a_label_trains_nothing():
    assert Example([1, 2], [-100, 2]).is_trained
    assert not Example([1, 2], [-100, -100]).is_trained and not Example([], []).is_trained
