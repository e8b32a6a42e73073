# SPDX-License-Identifier: Apache-2.0
"""Which released models' pixels can be kept (`--cache_pixels`): found out by trying, and named where not."""

from __future__ import annotations

import pytest

from moellava.errors import UserError
from moellava.lmm.architecture import ARCHITECTURES
from moellava.train.known_pixels import refuse_pixels, shows_the_same

KEPT = {
    *("llava-1.5", "llava-1.6", "llava-interleave", "llava-next-video", "llava-onevision"),
    *("gemma3", "paligemma", "phi3-v"),
}
"""Architectures whose pictures are of one shape each, or tiles of one shape."""


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_pixels_are_kept_or_refused_by_name(name, small_opened, tmp_path):
    vlm = small_opened(name)
    assert shows_the_same(vlm.encoder.reader) == (name in KEPT)
    if name not in KEPT:
        with pytest.raises(UserError, match=r"--cache_pixels .* makes pictures of many shapes"):
            refuse_pixels(vlm, str(tmp_path), None)
