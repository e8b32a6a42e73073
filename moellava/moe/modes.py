# SPDX-License-Identifier: Apache-2.0
"""What a model is for while it runs: to learn, or to be asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def has_dropout(module: nn.Module) -> bool:
    """Whether units of a module, or of one in it, are dropped at random while it learns."""
    return any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())


STOCHASTIC_DEPTH = ("droppath", "drop_path", "drop_connect", "stochasticdepth", "stochastic_depth")
"""What modules and settings are called that leave out the whole of a row (arXiv:1603.09382)."""


def drops_rows(model: nn.Module) -> bool:
    """Whether a model, or a part of one, drops whole rows of a batch at random while it learns, and not numbers each by
    themselves: samples that share a row would be dropped together."""
    settings = vars(model.config) if hasattr(model, "config") else {}
    named = [value for name, value in settings.items() if name.startswith(STOCHASTIC_DEPTH)]
    parts = [getattr(part, "drop_prob", 1.0) for part in model.modules() if _is_depth(type(part).__name__)]
    return any(isinstance(rate, float) and rate > 0 for rate in (*named, *parts))


def _is_depth(name: str) -> bool:
    return any(sort in name.lower() for sort in STOCHASTIC_DEPTH)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every module back to the mode that it was in: parts that are frozen may be in their own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
