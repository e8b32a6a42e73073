# SPDX-License-Identifier: Apache-2.0
"""Looking at all records before training: shared between the processes of a run, and between workers in each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

Item = TypeVar("Item")
Found = TypeVar("Found")

CHUNK = 64
"""Items that a worker looks at before it passes on what it has found."""


def shared(items: Sequence[Item], look: Callable[[Sequence[Item]], list[Found]]) -> list[Found]:
    """What `look` finds in each item, in their order, on every process.

    Where processes run together (`torch.distributed`), each looks at an even share, and they tell each other. That is
    collective: all of them come with the same items. What `look` raises on one process ends the run for all.

    Args:
        items: an indexable sequence; slices of it are passed on.
        look: items -> one finding each, in order; findings can be pickled.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return look(items)
    world_size = dist.get_world_size()
    shares: list[Any] = [None] * world_size
    dist.all_gather_object(shares, look(items[dist.get_rank() :: world_size]))
    found: list[Any] = [None] * len(items)
    for rank, share in enumerate(shares):
        found[rank::world_size] = share
    return found


def mapped(look: Callable[[Item], Found], items: Sequence[Item], workers: int = 0) -> list[Found]:
    """What `look` finds in each item, in their order.

    Args:
        look: item -> finding; findings can be pickled.
        items: an indexable sequence.
        workers: processes that look; 0: this one does.
    """
    loader = DataLoader(
        _Looking(look, items),
        batch_size=CHUNK,
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),  # its own, so that looking draws no random number of the run's
    )
    return list(chain.from_iterable(loader))


class _Looking(Dataset, Generic[Item, Found]):
    """Findings as a data set, so that a `DataLoader`'s workers make them."""

    def __init__(self, look: Callable[[Item], Found], items: Sequence[Item]):
        self.look = look
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Found:
        return self.look(self.items[index])
