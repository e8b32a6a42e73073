# SPDX-License-Identifier: Apache-2.0
"""Looking at all records before training: shared between the processes of a run, and between workers in each."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from moellava.errors import UserError
from moellava.log import get_logger

Item = TypeVar("Item")
Found = TypeVar("Found")

CHUNK = 64
"""Items that a worker looks at before it passes on what it has found."""

WORTH_A_WORKER = 2000
"""Items for which it pays to start a process more."""

SECONDS = 10.0
"""Between two messages about how far it has come."""


def gathered(finding: Found) -> list[Found]:
    """What each process that trains with this one has found, in the order of their ranks. Collective."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [finding]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, finding)
    return found


def share(count: int) -> tuple[int, int, int]:
    """This process's even share of so many items, as the arguments of `range`."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, count, 1
    return dist.get_rank(), count, dist.get_world_size()


def slices_of(numbers: np.ndarray, size: int) -> list[np.ndarray]:
    """Numbers, `size` at a time; a single slice without any where there are none."""
    return [numbers[begin : begin + size] for begin in range(0, max(len(numbers), 1), size)]


def workers_for(count: int, least: int = 0) -> int:
    """Processes that look at so many items: as many as there are cores for each process of the run, where it pays."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    worth = min(own, count // WORTH_A_WORKER)
    return max(worth if worth > 1 else 0, least)


def with_progress(items: Iterable[Item], count: int, what: str) -> Iterator[Item]:
    """Items as they come, and now and then a message how many of `count` there were, where it takes long."""
    began = last = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last > SECONDS and number < count:
            left = (now - began) / number * (count - number)
            get_logger(__name__).info("%s: %d %% of them, about %.0f s left", what, 100 * number // count, left)
            last = now


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


def mapped(
    look: Callable[[Item], Found], items: Sequence[Item], workers: int = 0, what: str = "", chunk: int = CHUNK
) -> list[Found]:
    """What `look` finds in each item, in their order.

    Args:
        look: item -> finding; findings can be pickled.
        items: an indexable sequence.
        workers: processes that look; 0: this one does.
        what: is looked at, for messages where it takes long.
        chunk: items that a worker looks at before it passes on what it has found.

    Raises:
        UserError: what `look` raises, the same whatever the workers are; or a worker was ended from outside.
    """
    what = what or "Looking"
    found: list[Found] = []
    with _unharmed(what):
        loader = DataLoader(
            _Looking(look, items),
            batch_size=chunk,
            num_workers=workers,
            collate_fn=list,
            generator=torch.Generator(),  # its own, so that looking draws no random number of the run's
        )
        for chunks in with_progress(loader, len(loader), what):
            for one in chunks:
                if isinstance(one, _Raised):
                    raise one.error
                found.append(one)
    return found


@contextmanager
def _unharmed(what: str) -> Iterator[None]:
    """Inside, a worker that ends before its time is a UserError, and more workers than cores are what was asked for."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")
            yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or "Caught" in str(error):
            raise
        raise UserError(
            f"{what}: a process beside this one was ended from outside, as where memory runs out. Fewer workers "
            "(--workers of check-data, --dataloader_num_workers in training) take less of it."
        ) from error


@dataclass(frozen=True)
class _Raised:
    """What `look` raised in a worker, as it is: a `DataLoader` would put the traceback before its message."""

    error: Exception


class _Looking(Dataset, Generic[Item, Found]):
    """Findings as a data set, so that a `DataLoader`'s workers make them."""

    def __init__(self, look: Callable[[Item], Found], items: Sequence[Item]):
        self.look = look
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Found | _Raised:
        try:
            return self.look(self.items[index])
        except (UserError, OSError) as error:
            return _Raised(error)
