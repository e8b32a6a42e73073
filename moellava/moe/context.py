# SPDX-License-Identifier: Apache-2.0
"""What routers know about the batch, and how their decisions outlive a recomputed forward.

Shapes: B rows, L positions, T = B × L, N real tokens, S sequences: rows, or the samples that share them.
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
class Tokens:
    """The tokens of a forward that are routed.

    Args:
        token_N: their indices among all T; None: all are.
        image_N: which of them are image patches; None: not known.
        sequence_N: the sequence of each.
        n_sequences: S.
    """

    token_N: Tensor | None
    image_N: Tensor | None
    sequence_N: Tensor
    n_sequences: int


@dataclass
class RoutingContext:
    """Shared by all sparse layers of a model; set before a forward, read by each layer.

    Args:
        token_mask: [B, L] bool, True where a token is real. None: all are.
        image_mask: [B, L] bool, True where an image patch stands. None: not known.
        places: indices [N] of the real tokens, where the host knows them; None: the first layer looks for them.
        sequences: the sequence of each real token [N], and S; None: every row is one.
        counts_answers: note load and losses of forwards that nothing is learnt from, too.
        kernel: what runs the experts, a name of `moellava.moe.kernels`.
    """

    token_mask: Tensor | None = None
    image_mask: Tensor | None = None
    places: Tensor | None = None
    sequences: tuple[Tensor, int] | None = None
    counts_answers: bool = False
    kernel: str = "auto"
    _tokens: dict[bool, Tokens] = field(default_factory=dict, repr=False)

    def set(
        self,
        token_mask: Tensor | None,
        image_mask: Tensor | None,
        places: Tensor | None = None,
        sequences: tuple[Tensor, int] | None = None,
    ) -> None:
        """What the next forward holds."""
        self.token_mask, self.image_mask, self.places, self.sequences = token_mask, image_mask, places, sequences
        self._tokens.clear()

    def tokens(self, shape: torch.Size, device: torch.device, with_padding: bool = False) -> Tokens:
        """The tokens that are routed, found once for all layers of a forward.

        Args:
            shape: [B, L] of the hidden states.
            device: of the layer.
            with_padding: padding is routed like any token.

        Raises:
            ValueError: masks of another shape.
        """
        known = self.token_mask is not None  # without a mask nothing says that a forward is another one
        if known and with_padding in self._tokens:
            self.flat("token_mask", shape)
            found = self._tokens[with_padding]
            if found.sequence_N.device == device:
                return found
        found = self._found(shape, device, with_padding)
        if known:
            self._tokens[with_padding] = found
        return found

    def _found(self, shape: torch.Size, device: torch.device, with_padding: bool) -> Tokens:
        mask_T, image_T = self.flat("token_mask", shape), self.flat("image_mask", shape)
        every_T = torch.arange(shape.numel(), device=device)
        token_N, sequences = None, None
        if mask_T is not None and not with_padding:
            token_N = every_T[mask_T.to(device)] if self.places is None else self.places.to(device)
            sequences = self.sequences
            token_N = None if len(token_N) == len(every_T) else token_N
        real_N = every_T if token_N is None else token_N
        image_N = None if image_T is None else image_T.to(device).index_select(0, real_N)
        if sequences is None:
            return Tokens(token_N, image_N, real_N // shape[1], shape[0])
        return Tokens(token_N, image_N, sequences[0].to(device), sequences[1])

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
