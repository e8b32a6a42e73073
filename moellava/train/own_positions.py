# SPDX-License-Identifier: Apache-2.0
"""Positions that a model counts itself, of samples that share rows.

Qwen-VL and its like give an image's tokens a place in time, height and width, and go on behind the largest of them.
They count so along a row from its begin, and not at all where they are handed positions. So samples are put into rows
of their own once more, as numbers alone, counted there, and laid end to end again:

    row                         a a a a a b b . .
    rows of their own           a a a a a        b b
    counted, one of the three   0 1 1 1 2 0 1 0 0

They are handed on behind 0 1 2 3 4 0 1 0 1, by which masks and flash attention tell samples apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

COUNTER = "get_rope_index"
"""What transformers calls the method that counts."""


def counter_of(model: Any) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """What counts a model's positions along rows; None: they are 0, 1, 2 …"""
    owners = (part for part in (model, model.base_model) if hasattr(part, COUNTER))
    return next((getattr(part, COUNTER) for part in owners), None)


def share_rows(model: Any, inputs: dict[str, Any], lengths: Sequence[int] | None) -> None:
    """Makes inputs those of rows that samples share: without a mask, and with positions as the model counts them.

    Args:
        model: not wrapped.
        inputs: of a forward; `position_ids` [B, L] begin at 0 in each sample. They become [4, B, L] where the model has
            its own.
        lengths: of the samples and of the padding, in order, where they are known; else the host waits for them.
    """
    mask_BL, count = inputs.pop("attention_mask"), counter_of(model)
    if count is None:
        return
    positions_BL = inputs["position_ids"]
    if lengths is None:
        lengths = ((positions_BL == 0).flatten().cumsum(0) - 1).bincount().tolist()
    is_real = torch.stack([part[0] for part in mask_BL.flatten().split(lengths)]).tolist()  # a sample has no gaps
    given = {"attention_mask": mask_BL, **inputs}
    given = {name: given[name] for name in inspect.signature(count).parameters if name in given}
    for name, value in given.items():
        if isinstance(value, Tensor) and value.shape == mask_BL.shape:
            parts = zip(value.flatten().split(lengths), is_real, strict=True)
            given[name] = pad_sequence([part for part, real in parts if real], batch_first=True)
    counted = iter(count(**given)[0].unbind(1))  # [3, longest] of each sample
    padding = positions_BL.new_zeros(3, max(lengths))
    rows = [(next(counted) if real else padding)[:, :n] for n, real in zip(lengths, is_real, strict=True)]
    three = torch.cat(rows, dim=1).view(3, *mask_BL.shape)
    inputs["position_ids"] = torch.cat([positions_BL[None], three.to(positions_BL)])
