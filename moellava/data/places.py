# SPDX-License-Identifier: Apache-2.0
"""Where in a batch something stands, found by the collator, on the host: on a GPU each such question of a mask would
make the host wait for all that the GPU still has to do.

Legend: B rows, L positions, N real tokens, S samples. Indices are into [B, L], flattened.

    input_ids       1  7  8  |  5  6  .      two samples and padding in one row
    position_ids    0  1  2     0  1  0
    real_N          0  1  2     3  4
    sequence_N      0  0  0     1  1
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from moellava.constants import IGNORE_INDEX

PLACES = "places"
"""Key of a batch of training; no input of the model."""


class Places(NamedTuple):
    """What the loss and the routers ask of a batch.

    Args:
        supervised: indices of positions whose next label is trained, in order.
        real: indices of tokens that are no padding, in order.
        sequence: the sample of each real token, from 0 on.
        n_sequences: S, or more: padding counts where samples share rows.
        is_packed: whether they do.
        lengths: positions of each sample and of the padding, where all of them share one row.
    """

    supervised: Tensor
    real: Tensor
    sequence: Tensor
    n_sequences: int
    is_packed: bool
    lengths: list[int] | None = None


def places_of(labels: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Places:
    """The places of a batch.

    Args:
        labels: [B, L], -100 where nothing is trained.
        attention_mask: [B, L], 0 where padding stands.
        position_ids: [B, L], 0 where a sample or padding begins; None: every row is one sample.
    """
    shifted = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    supervised = (shifted != IGNORE_INDEX).nonzero().squeeze(1)
    real = attention_mask.flatten().nonzero().squeeze(1)
    if position_ids is None:
        return Places(supervised, real, real // labels.shape[1], len(labels), False)
    number = (position_ids == 0).flatten().cumsum(0) - 1
    lengths = number.bincount().tolist() if len(labels) == 1 else None
    return Places(supervised, real, number.index_select(0, real), int(number[-1]) + 1, True, lengths)
