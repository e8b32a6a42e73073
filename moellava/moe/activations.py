# SPDX-License-Identifier: Apache-2.0
"""Activations as kernels of torch that write into given memory, found by what a function computes and not by its class.

transformers has some twenty classes, of which several compute the same, in one kernel or in eight operations
(`gelu_new`). A function is a kernel's if both say the same in double precision.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ops = torch.ops.aten

SAME = 1e-9
"""How far a function may be from a kernel: constants that are written out with ten digits."""

QUICK = 1.702
"""The factor of CLIP's `quick_gelu`, x · sigmoid(1.702 x)."""


class Kernel(NamedTuple):
    """An elementwise function.

    Args:
        forward: (x, out) -> writes the function of x into out.
        backward: (x, grad) -> puts its gradient in the place of that of its result.
    """

    forward: Callable[[Tensor, Tensor], object]
    backward: Callable[[Tensor, Tensor], object]


def _quick_gelu(x: Tensor, out: Tensor) -> None:
    torch.mul(x, QUICK, out=out)
    ops.silu_(out)
    out.mul_(1 / QUICK)


KERNELS = {
    "silu": Kernel(
        lambda x, out: ops.silu.out(x, out=out),
        lambda x, grad: ops.silu_backward.grad_input(grad, x, grad_input=grad),
    ),
    "gelu": Kernel(
        lambda x, out: ops.gelu.out(x, approximate="none", out=out),
        lambda x, grad: ops.gelu_backward.grad_input(grad, x, approximate="none", grad_input=grad),
    ),
    "gelu_tanh": Kernel(
        lambda x, out: ops.gelu.out(x, approximate="tanh", out=out),
        lambda x, grad: ops.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad),
    ),
    "relu": Kernel(
        lambda x, out: ops.relu.out(x, out=out),
        lambda x, grad: ops.threshold_backward.grad_input(grad, x, 0, grad_input=grad),
    ),
    "relu2": Kernel(
        lambda x, out: ops.relu.out(x, out=out).square_(),
        lambda x, grad: grad.mul_(x.clamp_min(0)).mul_(2),
    ),
    "quick_gelu": Kernel(
        _quick_gelu,
        lambda x, grad: ops.silu_backward.grad_input(grad, x * QUICK, grad_input=grad),
    ),
}

_found: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()


def kernel_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The name in `KERNELS` of what an elementwise function computes, found out once; None: it is none of them."""
    if activation not in _found:
        _found[activation] = _matching(activation)
    return _found[activation]


@torch.no_grad()
def _matching(activation: Callable[[Tensor], Tensor]) -> str | None:
    if isinstance(activation, nn.Module) and next(activation.parameters(), None) is not None:
        return None  # it learns
    x = torch.linspace(-12, 12, 481, dtype=torch.float64, device="cpu")
    wanted = activation(x.clone())
    for name, kernel in KERNELS.items():
        out = torch.empty_like(x)
        kernel.forward(x, out)
        if wanted.shape == x.shape and bool(((out - wanted).abs() <= SAME).all()):
            return name
    return None


def use_kernels(model: nn.Module) -> int:
    """Puts torch's tanh-GELU in the place of modules that compute it in many operations; returns how many they were.

    For training: the values are the same to rounding, and nothing of it is saved.
    """
    replaced = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            is_function = not [*child.children()] and not [*child.parameters()] and "GELU" in type(child).__name__
            if is_function and type(child) is not nn.GELU and kernel_name(child) == "gelu_tanh":
                setattr(module, name, nn.GELU("tanh"))
                replaced += 1
    return replaced
