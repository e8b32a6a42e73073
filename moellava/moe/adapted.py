# SPDX-License-Identifier: Apache-2.0
"""Experts whose linears are wrapped, as tensors: low-rank adapters beside a weight (LoRA), a weight in 4 bits, or both.

Legend: D inputs of a linear, I its outputs, r the rank of an adapter.

Calling such experts one by one leaves a GPU idle as any loop does. `moellava.adapters` says by `understand` what its
classes of linears compute; what nobody has spoken for, or does more than that, is called as a module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from moellava.moe.mlp import MLPLayout
from moellava.moe.weights import VERDICT, Activation, is_watched, plain_layout


@dataclass(frozen=True)
class Factors:
    """x Wᵀ + b + scale × (dropped-out x) Aᵀ Bᵀ.

    Args:
        sizes: I, D.
        weight: W [I, D]; or what makes it, where it is frozen and takes less memory as it is kept (4 bits).
        bias: b [I].
        down_rD, up_Ir: A and B; None: there is no adapter.
        scale: of the adapter's part.
        dropout: fraction of the adapter's input that is dropped now.
    """

    sizes: tuple[int, int]
    weight: Tensor | Callable[[], Tensor]
    bias: Tensor | None = None
    down_rD: Tensor | None = None
    up_Ir: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0

    @property
    def form(self) -> tuple:
        """What must be equal for the experts' linears to be run as one."""
        ranks = None if self.down_rD is None or self.up_Ir is None else (self.down_rD.shape, self.up_Ir.shape)
        return self.sizes, callable(self.weight), self.bias is None, ranks, self.scale, self.dropout


Reader = Callable[[nn.Module], Factors | None]

_readers: dict[type, Reader] = {}


def understand(linear: type, reader: Reader) -> None:
    """Notes what calling a class of linears computes, for exactly this class.

    Args:
        reader: of an instance as it is now (adapters can be switched off, and merged); None: more than `Factors` say.
    """
    _readers[linear] = reader


def factors_of(linear: nn.Module) -> Factors | None:
    """What calling a linear computes; None: it must be called."""
    if any(map(is_watched, linear.modules())):
        return None
    if type(linear) is nn.Linear:
        return Factors((linear.out_features, linear.in_features), linear.weight, linear.bias)
    reader = _readers.get(type(linear))
    return None if reader is None else reader(linear)


@dataclass(frozen=True)
class Adapted:
    """The experts of a layer.

    Args:
        linears: 'w1', 'w3', 'w13', 'w2' of an `MLPLayout` -> the factors of each expert, in order.
        activation: elementwise.
    """

    linears: dict[str, list[Factors]]
    activation: Activation


def adapted_of(experts: list[nn.Module]) -> Adapted | None:
    """Experts as tensors, some of whose linears are wrapped; None where they have to be called."""
    layout = _layout(experts[0])
    if layout is None or any(map(is_watched, experts)):
        return None
    linears: dict[str, list[Factors]] = {}
    for role, name in layout.linears.items():
        found = [factors_of(getattr(expert, name)) for expert in experts]
        known = [factors for factors in found if factors is not None]
        if len(known) < len(experts) or len({factors.form for factors in known}) > 1:
            return None
        linears[role] = known
    return Adapted(linears, getattr(experts[0], layout.activation))


def _layout(expert: nn.Module) -> MLPLayout | None:
    """As `plain_layout` of the same expert over plain linears, which is noted on the expert itself: found out once."""
    if VERDICT not in vars(expert):
        plain = copy.copy(expert)
        plain._modules = {name: _unwrapped(part) for name, part in expert.named_children()}
        plain_layout(plain)
        if VERDICT in vars(plain):
            vars(expert)[VERDICT] = vars(plain)[VERDICT]
    return vars(expert).get(VERDICT)


def _unwrapped(part: nn.Module) -> nn.Module:
    """A linear of the same weight and bias without what is around them; any other part as it is."""
    factors = None if type(part) is nn.Linear else factors_of(part)
    if factors is None:
        return part
    weight = factors.weight if isinstance(factors.weight, Tensor) else factors.weight()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    linear.bias = None if factors.bias is None else nn.Parameter(factors.bias.detach(), requires_grad=False)
    return linear
