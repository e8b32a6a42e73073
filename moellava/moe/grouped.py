# SPDX-License-Identifier: Apache-2.0
"""Experts by grouped matrix products: all experts of a layer in three kernel launches, for GPUs.

Legend: T tokens, D hidden, R routed rows sorted by expert, E experts, I intermediate units, P = 2 I columns of a linear
that holds w1 above w3.

On a GPU a loop over many small experts leaves most of it idle. `torch.nn.functional.grouped_mm` multiplies each
expert's rows by its own matrix in one launch. It wants the experts' weights stacked: where they lie at equal distances
in one memory, as `lie_together` and DeepSpeed's flat buffers have them, they are read where they are; else they are
copied. Each expert keeps parameters of its own, for the optimizer and on disk.

As in `fused.py`, tokens and what the input linears say are kept for the backward, and nothing that can be computed
again: with k choices, autograd would keep k rows of D numbers a token, and five of the units in place of two.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moellava.moe.adapted import Adapted
from moellava.moe.compiled import ALIGNMENT, are_aligned, grouped_product
from moellava.moe.fused import activate, activation_backward
from moellava.moe.places import Stacked, stacked
from moellava.moe.weights import TENSORS, Activation, Expert, Layout

GENERATIONS = (9, 10)
"""Compute capabilities, before the dot, for which torch has grouped kernels (Hopper, Blackwell), in bf16. Elsewhere
`grouped_mm` waits for the counts and multiplies expert by expert, in each product anew."""


def can_group(device: torch.device, dtype: torch.dtype, sizes: Iterable[int]) -> bool:
    """Whether grouped kernels run here: a GPU that has them, bf16, aligned sizes, a torch that knows them.

    Args:
        device, dtype: of the rows. A GPU that is none of this machine (in a plan) has them.
        sizes: D and I.
    """
    if device.type != "cuda" or dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] not in GENERATIONS:
        return False
    return are_aligned(dtype, sizes)


def run_grouped(
    x_TD: Tensor, gate_R: Tensor, token_R: Tensor, count_E: Tensor, layout: Layout, flat: list[Tensor | None]
) -> Tensor:
    """As `FusedExperts.apply`, in the dtype of x, whatever that of the experts' tensors is."""
    if not torch.compiler.is_compiling():
        return GroupedExperts.apply(x_TD, gate_R, token_R, count_E, layout, *flat)
    # The compiler decides itself what is kept.
    experts, ends_E = layout.experts(flat), count_E.cumsum(0).to(torch.int32)

    def linear(role: str, row_RD: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, bias = TENSORS[role]
        y_RI = _product(row_RD, [getattr(expert, weight) for expert in experts], ends_E)
        if getattr(experts[0], bias) is None:
            return y_RI, None
        return y_RI, _stacked([getattr(expert, bias) for expert in experts]).to(row_RD.dtype)

    roles = [role for role, (weight, _) in TENSORS.items() if weight in layout.names]
    return _through(linear, roles, layout.activation, x_TD, gate_R, token_R, count_E)


class GroupedExperts(torch.autograd.Function):
    """Σ over a token's experts of gate × expert(token), [T, D], summed in fp32.

    Args (of `apply`):
        x_TD, gate_R, token_R, count_E: tokens and their `Dispatch`.
        layout, flat: those of `tensors_of`. They are cast to the dtype of x where they are read.
    """

    @staticmethod
    def forward(ctx, x_TD, gate_R, token_R, count_E, layout: Layout, *flat):
        experts, ends_E = layout.experts(flat), count_E.cumsum(0).to(torch.int32)
        expert_R = _expert_of_rows(count_E, token_R)
        row_RD, gate_R1 = x_TD.index_select(0, token_R), gate_R.unsqueeze(1)
        said = [_grouped_linear(row_RD, experts, role, ends_E, expert_R) for role in _inputs(layout)]
        h1_RI, h3_RI = _halves(said, layout)
        inner_RI = torch.empty_like(h1_RI)
        activate(layout.activation, h1_RI, inner_RI)
        if h3_RI is not None:
            inner_RI.mul_(h3_RI)
        w2_EDI, b2_ED = _read(experts, "w2", x_TD.dtype)
        y_RD = F.grouped_mm((inner_RI * gate_R1).to(x_TD.dtype), w2_EDI.transpose(1, 2), offs=ends_E).float()
        if b2_ED is not None:
            y_RD.add_(gate_R1 * b2_ED[expert_R])
        ctx.layout = layout
        ctx.save_for_backward(x_TD, gate_R, token_R, count_E, *said, *flat)
        return torch.zeros_like(x_TD, dtype=torch.float32).index_add_(0, token_R, y_RD).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_TD):
        layout, inputs = ctx.layout, _inputs(ctx.layout)
        x_TD, gate_R, token_R, count_E, *rest = ctx.saved_tensors
        said, flat = rest[: len(inputs)], rest[len(inputs) :]
        experts, ends_E = layout.experts(flat), count_E.cumsum(0).to(torch.int32)
        expert_R, gate_R1 = _expert_of_rows(count_E, token_R), gate_R.unsqueeze(1)
        dflat: list[Tensor | None] = [None] * len(flat)

        def learn(role: str, row_RD: Tensor, grad_RI: Tensor, weigh: Tensor | None = None) -> None:
            """The gradients of a linear's tensors, where wanted; `weigh`: how much a row counts in that of the bias."""
            for name in TENSORS[role]:
                wanting = [place for place in layout.places(name, flat) if ctx.needs_input_grad[5 + place]]
                if not wanting:
                    continue
                if name.startswith("w"):
                    grad_E = F.grouped_mm(grad_RI.t(), row_RD, offs=ends_E)
                else:
                    row_RI = grad_RI.float() if weigh is None else grad_RI * weigh
                    grad_E = row_RI.new_zeros(len(experts), row_RI.shape[1]).index_add_(0, expert_R, row_RI)
                for place in wanting:
                    dflat[place] = grad_E[place // len(layout.names)].to(flat[place].dtype)

        h1_RI, h3_RI = _halves(said, layout)
        dy_RD = dout_TD.index_select(0, token_R)
        w2_EDI, b2_ED = _read(experts, "w2", x_TD.dtype)
        dinner_RI, act_RI = F.grouped_mm(dy_RD, w2_EDI, offs=ends_E), torch.empty_like(h1_RI)
        activate(layout.activation, h1_RI, act_RI)
        inner_RI = act_RI if h3_RI is None else act_RI * h3_RI
        learn("w2", (inner_RI * gate_R1).to(x_TD.dtype), dy_RD, gate_R1)
        dgate_R = torch.sum(dinner_RI * inner_RI, 1, dtype=gate_R.dtype)
        if b2_ED is not None:
            dgate_R += (dy_RD * b2_ED[expert_R]).sum(1, dtype=gate_R.dtype)
        dinner_RI = (dinner_RI * gate_R1).to(x_TD.dtype)
        dsaid = [torch.empty_like(one) for one in said]
        dh1_RI, dh3_RI = _halves(dsaid, layout)
        if dh3_RI is not None:
            torch.mul(dinner_RI, act_RI, out=dh3_RI)
        torch.mul(dinner_RI, 1 if h3_RI is None else h3_RI, out=dh1_RI)
        activation_backward(layout.activation, h1_RI, dh1_RI)
        row_RD, dx_TD = x_TD.index_select(0, token_R), None
        for role, grad_RI in zip(inputs, dsaid, strict=True):
            learn(role, row_RD, grad_RI)
        if ctx.needs_input_grad[0]:
            parts = zip(inputs, dsaid, strict=True)
            drow_RD = sum(F.grouped_mm(grad, _read(experts, role, grad.dtype)[0], offs=ends_E) for role, grad in parts)
            dx_TD = torch.zeros_like(x_TD, dtype=torch.float32).index_add_(0, token_R, drow_RD.float()).to(x_TD.dtype)
        return dx_TD, dgate_R, None, None, None, *dflat


def _inputs(layout: Layout) -> list[str]:
    """The linears that read tokens."""
    return [role for role in ("w1", "w3", "w13") if TENSORS[role][0] in layout.names]


def _halves(said: list[Tensor], layout: Layout) -> tuple[Tensor, Tensor | None]:
    """What w1 and w3 (None: there is none) have to do with, [R, I] each, of what stands for each of `_inputs`."""
    if len(said) == 2:
        return said[0], said[1]
    return said[0].chunk(2, dim=1) if layout.is_gated else (said[0], None)


def _expert_of_rows(count_E: Tensor, token_R: Tensor) -> Tensor:
    """The expert of each row, [R]."""
    every_E = torch.arange(len(count_E), device=token_R.device)
    return every_E.repeat_interleave(count_E, output_size=len(token_R))


def _read(experts: list[Expert], role: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A linear's weights [E, I, D] and biases [E, I] (None: it has none), where they lie if they have that dtype."""
    weights, biases = ([getattr(expert, name) for expert in experts] for name in TENSORS[role])
    return stacked(weights).to(dtype), None if biases[0] is None else stacked(biases).to(dtype)


def _grouped_linear(row_RD: Tensor, experts: list[Expert], role: str, ends_E: Tensor, expert_R: Tensor) -> Tensor:
    """A linear of every expert over its rows, [R, I]."""
    weight_EID, bias_EI = _read(experts, role, row_RD.dtype)
    y_RI = F.grouped_mm(row_RD, weight_EID.transpose(1, 2), offs=ends_E)
    return y_RI if bias_EI is None else y_RI.add_(bias_EI[expert_R])


def run_adapted(x_TD: Tensor, gate_R: Tensor, token_R: Tensor, count_E: Tensor, adapted: Adapted) -> Tensor:
    """The same of experts whose linears are wrapped, in the dtype of x; adapters are read where they lie."""
    ends_E, dtype = count_E.cumsum(0).to(torch.int32), x_TD.dtype

    def linear(role: str, row_RD: Tensor) -> tuple[Tensor, Tensor | None]:
        every = adapted.linears[role]
        first = every[0]
        if callable(first.weight):
            y_RI = FrozenProduct.apply(row_RD, ends_E, [factors.weight for factors in every])
        else:
            y_RI = _product(row_RD, [factors.weight for factors in every], ends_E)
        if first.down_rD is not None:
            down_ErD, up_EIr = _aligned(
                _stacked([factors.down_rD for factors in every]).to(dtype),
                _stacked([factors.up_Ir for factors in every]).to(dtype),
            )
            low_Rr = F.grouped_mm(F.dropout(row_RD, first.dropout), down_ErD.transpose(1, 2), offs=ends_E)
            y_RI = y_RI + F.grouped_mm(low_Rr, up_EIr.transpose(1, 2), offs=ends_E) * first.scale
        return y_RI, None if first.bias is None else _stacked([factors.bias for factors in every]).to(dtype)

    return _through(linear, list(adapted.linears), adapted.activation, x_TD, gate_R, token_R, count_E)


def _through(
    linear: Callable[[str, Tensor], tuple[Tensor, Tensor | None]],
    roles: Collection[str],
    activation: Activation,
    x_TD: Tensor,
    gate_R: Tensor,
    token_R: Tensor,
    count_E: Tensor,
) -> Tensor:
    """Σ over a token's experts of gate × expert(token), [T, D], summed in fp32.

    Args:
        linear: (role, rows) -> what that linear of every expert makes of its rows, and the biases [E, I] to add.
        roles: those that there are.
    """
    expert_R = _expert_of_rows(count_E, token_R)

    def biased(role: str, row_RD: Tensor) -> Tensor:
        y_RI, bias_EI = linear(role, row_RD)
        return y_RI if bias_EI is None else y_RI + bias_EI[expert_R]

    row_RD, gate_R1 = x_TD.index_select(0, token_R), gate_R.unsqueeze(1)
    if "w13" in roles:
        h1_RI, h3_RI = biased("w13", row_RD).chunk(2, dim=1)
        inner_RI = activation(h1_RI) * h3_RI
    else:
        inner_RI = activation(biased("w1", row_RD))
        if "w3" in roles:
            inner_RI = inner_RI * biased("w3", row_RD)
    y_RD, bias_ED = linear("w2", (inner_RI * gate_R1).to(x_TD.dtype))
    if bias_ED is not None:
        y_RD = y_RD + gate_R1 * bias_ED[expert_R]
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    return out_TD.index_add(0, token_R, y_RD.float()).to(x_TD.dtype)


class FrozenProduct(torch.autograd.Function):
    """Rows by their experts' frozen weights, which are made when they are needed: forward and backward, never kept."""

    @staticmethod
    def forward(ctx, row_RD: Tensor, ends_E: Tensor, makers: list[Callable[[], Tensor]]) -> Tensor:
        ctx.makers = makers
        ctx.save_for_backward(ends_E)
        return F.grouped_mm(row_RD, _made(makers, row_RD.dtype).transpose(1, 2), offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RI: Tensor):
        return F.grouped_mm(grad_RI, _made(ctx.makers, grad_RI.dtype), offs=ctx.saved_tensors[0]), None, None


def _made(makers: list[Callable[[], Tensor]], dtype: torch.dtype) -> Tensor:
    """The weights of all experts, [E, I, D]."""
    return torch.stack([make().to(dtype) for make in makers])


def _aligned(down_ErD: Tensor, up_EIr: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of a rank that the kernels take: with zeros behind, which add nothing."""
    lacking = -down_ErD.shape[1] % (ALIGNMENT // down_ErD.element_size())
    return (F.pad(down_ErD, (0, 0, 0, lacking)), F.pad(up_EIr, (0, lacking))) if lacking else (down_ErD, up_EIr)


def _product(row_RD: Tensor, weights: list[Tensor], ends_E: Tensor) -> Tensor:
    """Rows by the weights of their experts, in the rows' dtype."""
    if torch.compiler.is_compiling():
        return grouped_product(row_RD, [weight.to(row_RD.dtype) for weight in weights], ends_E)
    return F.grouped_mm(row_RD, Stacked.apply(*weights).to(row_RD.dtype).transpose(1, 2), offs=ends_E)


def _stacked(tensors: list[Tensor]) -> Tensor:
    """One tensor of each expert as [E, …]."""
    return torch.stack(tensors) if torch.compiler.is_compiling() else Stacked.apply(*tensors)
