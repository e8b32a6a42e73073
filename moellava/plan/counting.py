# SPDX-License-Identifier: Apache-2.0
"""Counts what a computation on fake tensors would allocate and multiply, and answers what only numbers could.

Fake tensors (`torch._subclasses.fake_tensor`) have shapes and no numbers. A step runs on them as it is; where it would
read a number, `EvenLoad` says what an even load would: every expert gets as many rows as any other, conditions on
values hold.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

LEFT_OUT: dict[Any, Callable[..., int]] = {
    torch.ops.aten._grouped_mm: lambda one, other, *rest: grouped_flops(one, other),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *rest: sdpa_flop_count(
        query.shape, key.shape, value.shape
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, query, key, value, *rest: (
        sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)
    ),
    torch.ops.aten.addmm_: lambda total, one, other: 2 * one.shape[0] * one.shape[1] * other.shape[1],
}
"""Operations that torch's registry leaves out -> FLOPs of their tensors: grouped products, attention on a CPU, and
products that add to what is there."""


class Counting(TorchDispatchMode):
    """Bytes of the tensors that are alive, and operations of matrix products.

    Args:
        owned: tensors whose bytes are counted elsewhere: weights and buffers.

    Attributes:
        peak: most bytes alive at one time, kept gradients left out.
        peak_with_gradients: the same with them.
        flops: of matrix products and attention; a multiplication and an addition are two. (`FlopCounterMode` cannot
            look into a backward that calls `autograd.grad` itself, as that of `FusedExperts` does.)
    """

    def __init__(self, owned: Iterable[Tensor] = ()):
        super().__init__()
        self.peak = self.peak_with_gradients = self.alive = self.kept = 0
        self.flops = 0
        self._bytes = {tensor.untyped_storage()._cdata: 0 for tensor in owned}

    def keep_gradient(self, parameter: Tensor) -> None:
        """Takes a parameter's gradient, which is counted apart from then on."""
        if parameter.grad is not None:
            self.kept += parameter.grad.nbytes
        parameter.grad = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (left_out := LEFT_OUT.get(func._overloadpacket)) is not None:
            self.flops += left_out(*args)
        elif (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        is_copy = func._overloadpacket is not torch.ops.aten.stack  # of experts' weights, which lie together
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self._see(tensor, is_copy)
        return out

    def _see(self, tensor: Tensor, is_copy: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._bytes:
            return
        self._bytes[key] = storage.nbytes() if is_copy else 0
        weakref.finalize(storage, self._forget, key)
        self.alive += self._bytes[key]
        self.peak = max(self.peak, self.alive)
        self.peak_with_gradients = max(self.peak_with_gradients, self.alive + self.kept)

    def _forget(self, key: int) -> None:
        self.alive -= self._bytes.pop(key)


def grouped_flops(a: Tensor, b: Tensor) -> int:
    """Of a grouped product: rows [R, K] by matrices [E, K, N], or their gradient [K, R] by [R, N] in groups."""
    return 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]


class EvenLoad(TorchFunctionMode):
    """Answers for fake tensors what would be read from numbers.

    Args:
        selected: how many elements a mask of truth values selects.
        on_gpu: whether tensors shall pass for a GPU's, so that the code for GPUs runs.
    """

    def __init__(self, selected: int, on_gpu: bool):
        super().__init__()
        self.selected = selected
        self.on_gpu = on_gpu

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.is_cpu.__get__ and self.on_gpu:
            return False
        if func is torch._grouped_mm and args[0].dtype != torch.bfloat16:  # whose shapes torch tells of bf16 alone
            return args[0] @ args[1][0]  # each row meets one expert
        if func is torch.Tensor.__bool__:
            return True
        if func is torch.bincount:
            return even_counts(args[0].new_zeros(kwargs["minlength"]), args[0].numel())
        if func is torch.Tensor.scatter_add_ and args[0].dtype == torch.long:  # in its place on a GPU
            return even_counts(func(*args), args[2].numel())
        if func is torch.Tensor.__getitem__ and isinstance(args[1], slice) and hasattr(args[0], "choices"):
            return even_counts(func(*args), args[0].choices)
        if func is torch.Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            tensor, mask = args
            return tensor.flatten(0, mask.ndim - 1)[torch.arange(self.selected, device=tensor.device)]
        return func(*args, **kwargs)


def even_counts(counts: Any, choices: int) -> Tensor:
    """Says of a fake tensor [E] that it counts even choices among E numbers: it can be read as a list, and so can a
    slice of it, where the choices are among fewer."""
    each, more = divmod(choices, len(counts))
    counts.choices = choices
    counts.tolist = lambda: [each + (index < more) for index in range(len(counts))]
    return counts
