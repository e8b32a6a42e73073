# SPDX-License-Identifier: Apache-2.0
"""The tensors of experts: by name, and flat, as `torch.autograd.Function.apply` takes them.

Legend: D hidden, I intermediate units, P = 2 I columns of a linear that holds w1 above w3.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moellava.moe.mlp import MLPLayout, layouts_of
from moellava.moe.modes import has_dropout

Activation = Callable[[Tensor], Tensor]

TENSORS = {"w1": ("w1_ID", "b1_I"), "w3": ("w3_ID", "b3_I"), "w13": ("w13_PD", "b13_P"), "w2": ("w2_DI", "b2_D")}
"""Linear of an `MLPLayout` -> its weight and its bias in `Expert`."""


@dataclass
class Expert:
    """One expert's tensors: (act(x w1ᵀ + b1) × (x w3ᵀ + b3)) w2ᵀ + b2, without the second factor if it is not gated.

    Of gradients the same. None: the expert has no such tensor, or its gradient is not wanted. Where w1 and w3 are one
    linear, they are views of it.
    """

    w1_ID: Tensor | None = None
    b1_I: Tensor | None = None
    w3_ID: Tensor | None = None
    b3_I: Tensor | None = None
    w13_PD: Tensor | None = None
    b13_P: Tensor | None = None
    w2_DI: Tensor | None = None
    b2_D: Tensor | None = None

    def __post_init__(self) -> None:
        if self.w13_PD is not None:
            self.w1_ID, self.w3_ID = self.w13_PD.chunk(2)
        if self.b13_P is not None:
            self.b1_I, self.b3_I = self.b13_P.chunk(2)

    @property
    def width(self) -> int:
        """I."""
        assert self.w2_DI is not None  # of an expert, that is; a gradient may be without
        return self.w2_DI.shape[1]

    def to(self, dtype: torch.dtype) -> Expert:
        """The tensors in a dtype; itself where they have it."""
        if self.w2_DI is None or self.w2_DI.dtype == dtype:
            return self
        joined = ("w1_ID", "b1_I", "w3_ID", "b3_I") if self.w13_PD is not None else ()
        own = {name: tensor for name, tensor in vars(self).items() if tensor is not None and name not in joined}
        return Expert(**{name: tensor.to(dtype) for name, tensor in own.items()})

    def zero_(self) -> None:
        """Fills all tensors with zeros."""
        for tensor in vars(self).values():
            if tensor is not None:
                tensor.zero_()


@dataclass(frozen=True)
class Layout:
    """What the experts of a layer have in common.

    Args:
        names: fields of `Expert`, in the order of an expert's tensors among the flat ones.
        activation: elementwise.
    """

    names: tuple[str, ...]
    activation: Activation

    @property
    def is_gated(self) -> bool:
        """Whether the activation's result is multiplied by another linear's."""
        return "w3_ID" in self.names or "w13_PD" in self.names

    def experts(self, flat: Sequence[Tensor | None]) -> list[Expert]:
        """The tensors by name.

        Args:
            flat: those of `names` of the first expert, of the second one, …
        """
        count = len(self.names)
        return [Expert(**dict(zip(self.names, flat[start : start + count]))) for start in range(0, len(flat), count)]

    def places(self, name: str, flat: Sequence[Tensor | None]) -> range:
        """Where a tensor of each expert stands among the flat ones."""
        return range(self.names.index(name), len(flat), len(self.names))


def tensors_of(modules: list[nn.Module]) -> tuple[Layout, list[Tensor | None]] | None:
    """The layout of all experts and their flat tensors; None if something other than the tensors takes part."""
    layout = plain_layout(modules[0])
    if layout is None:
        return None
    flat: list[Tensor | None] = []
    for module in modules:
        linears = [getattr(module, name) for name in layout.linears.values()]
        if not is_called_plainly(module, linears):
            return None
        for linear in linears:
            flat += [linear.weight, linear.bias]
    names = tuple(name for role in layout.linears for name in TENSORS[role])
    return Layout(names, getattr(modules[0], layout.activation)), flat


OFF = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far the formula of `Expert` may be from the module itself, as a fraction of its norm: rounding."""

VERDICT = "_plain_layout"
"""Where a module keeps what `plain_layout` has found; deep copies take it along."""


def plain_layout(module: nn.Module) -> MLPLayout | None:
    """The layout with which the formula of `Expert` is all that a module computes, found out once; None: there is more
    to it, such as a norm in the middle (BitNet), cut-off units (Gemma 3n) or dropout."""
    if torch.compiler.is_compiling():
        _look_at(module)  # on numbers, which a graph has none of
    elif VERDICT not in vars(module):
        _look_at(module)
    return getattr(module, VERDICT, None)


@torch.compiler.assume_constant_result
def _look_at(module: nn.Module) -> bool:
    """Notes on a module what `plain_layout` asks, where it has not been noted; else, and if the module has to be called
    as it now is, nothing. Returns whether it is noted."""
    if VERDICT not in vars(module) and not any(map(is_watched, module.modules())) and _is_bare(module):
        found = [layout for layout in layouts_of(module) if _says_all(module, layout)]
        vars(module)[VERDICT] = found[0] if found else None
    return VERDICT in vars(module)


def _is_bare(module: nn.Module) -> bool:
    """Whether its linears are plain ones, in no adapter and in no 4 bits."""
    linears = {getattr(module, name) for layout in layouts_of(module) for name in layout.linears.values()}
    return all(type(linear) is nn.Linear for linear in linears)


@torch.no_grad()
def _says_all(module: nn.Module, layout: MLPLayout) -> bool:
    linears = [getattr(module, name) for name in layout.linears.values()]
    if not layout.activation or has_dropout(module):
        return False
    tensors = [tensor for linear in linears for tensor in (linear.weight, linear.bias)]
    names = [name for role in layout.linears for name in TENSORS[role]]
    expert, weight = Expert(**dict(zip(names, tensors, strict=True))), linears[-1].weight
    x_ND = torch.randn(4, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(weight)
    wanted, found = module(x_ND).float(), _formula(expert, getattr(module, layout.activation), x_ND).float()
    return bool((found - wanted).norm() <= OFF[weight.dtype] * wanted.norm())


def _formula(expert: Expert, activation: Activation, x_ND: Tensor) -> Tensor:
    assert expert.w1_ID is not None and expert.w2_DI is not None
    inner_NI = activation(nn.functional.linear(x_ND, expert.w1_ID, expert.b1_I))
    if expert.w3_ID is not None:
        inner_NI = inner_NI * nn.functional.linear(x_ND, expert.w3_ID, expert.b3_I)
    return nn.functional.linear(inner_NI, expert.w2_DI, expert.b2_D)


def is_called_plainly(module: nn.Module, linears: Collection[nn.Module]) -> bool:
    """Whether calling an MLP runs its linears, and they their weights, with nothing around it."""
    return all(type(linear) is nn.Linear for linear in linears) and not any(map(is_watched, (module, *linears)))


def is_watched(module: nn.Module) -> bool:
    """Whether something must happen when the module is called: hooks, or a forward of its own (offloaded weights)."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
