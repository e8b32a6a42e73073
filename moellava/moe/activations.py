# SPDX-License-Identifier: Apache-2.0
"""Activations as kernels of torch that write into given memory, found by what a function computes and not by its class.

transformers has some twenty classes, of which several compute the same, in one kernel or in eight operations
(`gelu_new`). A function is a kernel's if both say the same in double precision.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ops = torch.ops.aten

SAME = 1e-9
"""How far a function may be from a kernel: constants that are written out with ten digits."""

QUICK = 1.702
"""The factor of CLIP's `quick_gelu`, x · sigmoid(1.702 x)."""

CLIP = 10.0
"""Where `gelu_10` is cut off."""

LAPLACE = (0.707107, 0.282095)
"""Mean and deviation of MEGA's `laplace` (arXiv:2209.10655)."""

LEAK = 0.01
"""The slope of `leaky_relu` below 0."""


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


def _clipped_gelu_backward(x: Tensor, grad: Tensor) -> None:
    is_cut = (x > CLIP).logical_or_(x < -CLIP)  # the function is below x, and so near to it that this is the same
    ops.gelu_backward.grad_input(grad, x, approximate="none", grad_input=grad).masked_fill_(is_cut, 0)


def _laplace(x: Tensor, out: Tensor) -> None:
    mean, deviation = LAPLACE
    torch.sub(x, mean, out=out).div_(deviation * math.sqrt(2)).erf_().add_(1).mul_(0.5)


def _laplace_backward(x: Tensor, grad: Tensor) -> None:
    mean, deviation = LAPLACE
    density = ((x - mean) / deviation).square_().mul_(-0.5).exp_()
    grad.mul_(density).div_(deviation * math.sqrt(2 * math.pi))


def _sqrtsoftplus_backward(x: Tensor, grad: Tensor) -> None:
    root = ops.softplus(x).sqrt_()
    ops.softplus_backward.grad_input(grad, x, 1, 20, grad_input=grad).div_(root.mul_(2))


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
    "gelu_10": Kernel(
        lambda x, out: ops.gelu.out(x, approximate="none", out=out).clamp_(-CLIP, CLIP), _clipped_gelu_backward
    ),
    "hardswish": Kernel(
        lambda x, out: ops.hardswish.out(x, out=out),
        lambda x, grad: ops.hardswish_backward.out(grad, x, out=grad),
    ),
    "laplace": Kernel(_laplace, _laplace_backward),
    "leaky_relu": Kernel(
        lambda x, out: ops.leaky_relu.out(x, LEAK, out=out),
        lambda x, grad: ops.leaky_relu_backward.grad_input(grad, x, LEAK, False, grad_input=grad),
    ),
    "linear": Kernel(lambda x, out: out.copy_(x), lambda x, grad: grad),
    "mish": Kernel(
        lambda x, out: ops.mish.out(x, out=out),
        lambda x, grad: grad.copy_(ops.mish_backward(grad, x)),
    ),
    "relu6": Kernel(
        lambda x, out: ops.hardtanh.out(x, 0, 6, out=out),
        lambda x, grad: ops.hardtanh_backward.grad_input(grad, x, 0, 6, grad_input=grad),
    ),
    "sigmoid": Kernel(
        lambda x, out: ops.sigmoid.out(x, out=out),
        lambda x, grad: ops.sigmoid_backward.grad_input(grad, x.sigmoid(), grad_input=grad),
    ),
    "sqrtsoftplus": Kernel(lambda x, out: ops.softplus.out(x, out=out).sqrt_(), _sqrtsoftplus_backward),
    "tanh": Kernel(
        lambda x, out: ops.tanh.out(x, out=out),
        lambda x, grad: ops.tanh_backward.grad_input(grad, x.tanh(), grad_input=grad),
    ),
}
"""What transformers has a name for; what learns (`prelu`, `xielu`) is differentiated by autograd."""

_found: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()


def kernel_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The name in `KERNELS` of what an elementwise function computes, found out once; None: it is none of them."""
    if activation not in _found:
        with ThreadPoolExecutor(1) as apart:  # modes are a thread's own, and in a trace nothing has a number
            _found[activation] = apart.submit(_matching, activation).result()
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
