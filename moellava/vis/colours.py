# SPDX-License-Identifier: Apache-2.0
"""Colours that are told apart with any eyes: Okabe and Ito's eight, and what to do with more experts than colours."""

from __future__ import annotations

import numpy as np

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#444444")
"""Okabe and Ito (2008), the black a dark grey."""

OTHERS = "#D5D5D5"
"""All experts that have no colour of their own."""

IMAGE, TEXT = PALETTE[1], PALETTE[0]
"""Tokens of images and of text."""


def coloured(chosen: np.ndarray, n_experts: int) -> dict[int, str]:
    """Expert -> colour: each has its own where there are eight or fewer, so that a colour means the same everywhere;
    else the seven that are chosen most have one, in that order.

    Args:
        chosen: experts, one for each token that is drawn.
    """
    if n_experts <= len(PALETTE):
        return dict(enumerate(PALETTE[:n_experts]))
    counts = np.bincount(chosen[chosen >= 0], minlength=n_experts)
    most = sorted(range(n_experts), key=lambda expert: -counts[expert])[: len(PALETTE) - 1]
    return dict(zip([expert for expert in most if counts[expert]], PALETTE, strict=False))
