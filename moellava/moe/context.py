# SPDX-License-Identifier: Apache-2.0
"""What routers know about the batch, and how their decisions outlive a recomputed forward.

Shapes: B sequences, L positions, T = B × L.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass
class RoutingContext:
    """Shared by all sparse layers of a model; set before a forward, read by each layer.

    Args:
        token_mask: [B, L] bool, True where a token is real. None: all are.
        image_mask: [B, L] bool, True where an image patch stands. None: not known.
        counts_answers: note load and losses of forwards that nothing is learnt from, too.
    """

    token_mask: Tensor | None = None
    image_mask: Tensor | None = None
    counts_answers: bool = False

    def flat(self, name: str, shape: torch.Size) -> Tensor | None:
        """A mask as [T], checked against the [B, L] of the hidden states. Raises ValueError if they differ."""
        mask = getattr(self, name)
        if mask is None:
            return None
        if mask.shape != shape:
            raise ValueError(
                f"The routing context's {name} is {list(mask.shape)}, but the hidden states are {list(shape)}: "
                "call set_routing_context(model, …) before each forward, and set_routing_context(model) with "
                "nothing before generation."
            )
        return mask.reshape(-1)


@dataclass
class _Region:
    """One checkpointed region: what its layers decided, in the order in which they were called."""

    decisions: list[Any] = field(default_factory=list)
    position: int = 0


_active = threading.local()


class _Enter:
    """Makes a region current, to record or to replay. A class, because a recomputation may run more than once."""

    def __init__(self, region: _Region, replay: bool):
        self.region, self.replay = region, replay

    def __enter__(self) -> None:
        self.outer = getattr(_active, "state", None)
        self.region.position = 0
        _active.state = self

    def __exit__(self, *error: object) -> None:
        _active.state = self.outer


def checkpoint_contexts() -> tuple[_Enter, _Enter]:
    """`context_fn` of `torch.utils.checkpoint`: routing is decided in the forward and replayed when it is recomputed.

    Without it a recomputed layer routes anew: a token may go elsewhere when the arithmetic differs by a rounding, and
    the load is counted twice. `enable_gradient_checkpointing` passes it.
    """
    region = _Region()
    return _Enter(region, replay=False), _Enter(region, replay=True)


def decide(make: Callable[[], T]) -> tuple[T, bool]:
    """`make()`, or what it gave when this region ran first.

    Returns:
        The decision, and whether it is a replay (then nothing may be counted again).
    """
    state = getattr(_active, "state", None)
    if state is not None and state.replay:
        state.region.position += 1
        return state.region.decisions[state.region.position - 1], True
    decision = make()
    if state is not None:
        state.region.decisions.append(decision)
    return decision, False
