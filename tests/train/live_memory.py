# SPDX-License-Identifier: Apache-2.0
"""Bytes of tensors that are alive at once, counted without having them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, while they are alive.

    Args:
        before: tensors that are there already, and not counted.

    Attributes:
        peak: most bytes at once.
    """

    def __init__(self, before: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in before)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size


def peak_of(make: Callable[[], Any], loss_of: Callable[..., Callable[[], torch.Tensor]], share: float) -> int:
    """Bytes of a first step above weights and gradients, with so large a share of 2,048 positions supervised.

    Args:
        make: the model.
        loss_of: (model, ids, labels) -> what gives the loss.
    """
    with FakeTensorMode():
        model, trained = make(), int(share * 2047)
        ids = torch.zeros(1, 2048, dtype=torch.long)
        labels = torch.zeros_like(ids)
        labels.trained = trained
        loss = loss_of(model, ids, labels)
        with LiveBytes(model.parameters()) as live:
            loss().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return live.peak - sum(gradient.nbytes for gradient in gradients)
