# SPDX-License-Identifier: Apache-2.0
"""What a model is for while it runs: to learn, or to be asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def has_dropout(module: nn.Module) -> bool:
    """Whether units of a module, or of one in it, are dropped at random while it learns."""
    return any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())


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
