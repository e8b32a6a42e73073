"""Experts as one autograd node: few operations per expert, and nothing kept that can be computed again.

Legend: T tokens, D hidden, R routed rows sorted by expert, n the rows of one expert, I intermediate units.

A loop over `expert(rows)` under autograd spends its time on what surrounds the matrix products: rows copied for all
experts at once, a full-size gradient for each, five saved tensors per row, elementwise passes over more than the
cache holds. Here an expert's rows stay in the cache from the gather to the addition, elementwise work goes in blocks
and in place, and only the input linears' results are saved. In the backward the gate is multiplied into the gathered
gradient; its own gradient is then what is left of the units' gradient, divided by the gate at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moellava.moe.mlp import MLPKind, kind_of

Activation = Callable[[Tensor], Tensor]

BLOCK = 65_536
"""Elements of an elementwise block: the six fp32 tensors of one stay near a core's L2 cache (half or twice: alike)."""


@dataclass(frozen=True)
class Layout:
    """What the flat tensors of an expert mean: a weight and a bias (or None) per linear, inputs first.

    Args:
        blocks: of each input linear, how many blocks of I rows it holds (gate and up in one linear: 2).
        activation: elementwise. With two blocks in all, the expert is gated: act(first) × second.
    """

    blocks: tuple[int, ...]
    activation: Activation

    @property
    def stride(self) -> int:
        """Tensors of one expert."""
        return 2 * len(self.blocks) + 2

    def pieces(self, base: int, width: int) -> list[tuple[int, slice]]:
        """(position of the weight, its rows) of each block of an expert whose tensors begin at `base`."""
        return [
            (base + 2 * linear, slice(block * width, (block + 1) * width))
            for linear, blocks in enumerate(self.blocks)
            for block in range(blocks)
        ]


def tensors_of(experts: list[nn.Module]) -> tuple[Layout, list[Tensor | None]] | None:
    """The layout and the flat tensors of all experts; None if they cannot be fused."""
    kind = kind_of(experts[0])
    tensors: list[Tensor | None] = []
    for expert in experts:
        linears = _bare_linears(expert, kind)
        if linears is None:
            return None
        for linear in linears:
            tensors += [linear.weight, linear.bias]
    return Layout(tuple(kind.inputs.values()), getattr(experts[0], kind.activation)), tensors


def _bare_linears(expert: nn.Module, kind: MLPKind) -> list[nn.Linear] | None:
    """The expert's linears, inputs first; None where one is not a bare `nn.Linear` (LoRA, 4-bit)."""
    linears = [getattr(expert, name) for name in (*kind.inputs, kind.output)]
    if not all(type(linear) is nn.Linear for linear in linears):
        return None
    return None if any(_is_watched(module) for module in (expert, *linears)) else linears


def _is_watched(module: nn.Module) -> bool:
    """Whether something must happen when the module is called: hooks, or a forward of its own (offloaded weights)."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class FusedExperts(torch.autograd.Function):
    """Σ over a token's experts of gate × expert(token), [T, D], summed in fp32.

    Args (of `apply`):
        x_TD, gate_R, token_R, counts: tokens and their `Dispatch`.
        layout, tensors: those of `tensors_of`.
    """

    @staticmethod
    def forward(ctx, x_TD, gate_R, token_R, counts, layout: Layout, *tensors):
        width, most = tensors[layout.stride - 2].shape[1], max(counts)
        pre = [x_TD.new_empty(len(token_R), width) for _ in range(sum(layout.blocks))]
        x_MD, inner_MI = x_TD.new_empty(most, x_TD.shape[1]), x_TD.new_empty(most, width)
        y_MD = torch.empty_like(x_MD)
        row_MD = y_MD.float()  # the same memory if that is fp32 already
        out_TD = torch.zeros(x_TD.shape, dtype=row_MD.dtype, device=x_TD.device)
        for base, count, token_n, gate_n1, *pre_n in _per_expert(layout, counts, token_R, gate_R.unsqueeze(1), *pre):
            output, inner_nI, y_nD = base + layout.stride - 2, inner_MI[:count], y_MD[:count]
            x_nD = torch.index_select(x_TD, 0, token_n, out=x_MD[:count])
            for part, (position, piece) in zip(pre_n, layout.pieces(base, width), strict=True):
                _linear(x_nD, tensors[position][piece], _piece(tensors[position + 1], piece), part)
            _inner(layout.activation, pre_n, inner_nI)
            _linear(inner_nI, tensors[output], tensors[output + 1], y_nD)
            out_TD.index_add_(0, token_n, torch.mul(y_nD, gate_n1, out=row_MD[:count]))
        ctx.counts, ctx.layout = counts, layout
        ctx.save_for_backward(x_TD, gate_R, token_R, *pre, *tensors)
        return out_TD.to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_TD):
        layout, needs = ctx.layout, ctx.needs_input_grad[5:]
        x_TD, gate_R, token_R, *rest = ctx.saved_tensors
        pre, tensors = rest[: sum(layout.blocks)], rest[sum(layout.blocks) :]
        grads = _room_for_gradients(tensors, needs, ctx.counts, layout.stride)
        dx_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        dgate_R = torch.empty_like(gate_R)
        width, most = pre[0].shape[1], max(ctx.counts)
        dy_MD, inner_MI = dout_TD.new_empty(most, x_TD.shape[1]), dout_TD.new_empty(most, width)
        x_MD, dpre_M = torch.empty_like(dy_MD), [torch.empty_like(inner_MI) for _ in pre]
        per_expert = _per_expert(layout, ctx.counts, token_R, gate_R.unsqueeze(1), dgate_R, *pre)
        for base, count, token_n, gate_n1, dgate_n, *pre_n in per_expert:
            output, inner_nI, dpre_n = base + layout.stride - 2, inner_MI[:count], [part[:count] for part in dpre_M]
            dy_nD = torch.index_select(dout_TD, 0, token_n, out=dy_MD[:count]).mul_(gate_n1)
            torch.mm(dy_nD, tensors[output], out=dpre_n[0])
            _inner_backward(layout.activation, pre_n, dpre_n, inner_nI, dgate_n)
            if tensors[output + 1] is not None:
                dgate_n += dy_nD.float() @ tensors[output + 1].float()
            _linear_backward(dy_nD, inner_nI, grads[output], grads[output + 1])
            x_nD = torch.index_select(x_TD, 0, token_n, out=x_MD[:count])
            dx_nD = dy_nD  # its values are used up
            for number, (position, piece) in enumerate(layout.pieces(base, width)):
                dx_nD.addmm_(dpre_n[number], tensors[position][piece], beta=min(number, 1))
                weight, bias = grads[position : position + 2]
                _linear_backward(dpre_n[number], x_nD, _piece(weight, piece), _piece(bias, piece))
            dx_TD.index_add_(0, token_n, dx_nD.float())
        dgate_R /= gate_R.clamp_min(torch.finfo(gate_R.dtype).tiny)  # at 0 the softmax behind it has no gradient
        return dx_TD.to(x_TD.dtype), dgate_R, None, None, None, *grads


def _per_expert(layout: Layout, counts: list[int], *of_rows: Tensor) -> Iterator[tuple]:
    """(position of the first tensor, number of rows, its part of each tensor of R rows) of experts with rows."""
    parts = zip(*(tensor.split(counts) for tensor in of_rows), strict=True)
    for index, (count, part) in enumerate(zip(counts, parts, strict=True)):
        if count:
            yield index * layout.stride, count, *part


def _room_for_gradients(tensors, needs, counts: list[int], stride: int) -> list[Tensor | None]:
    """Memory for the gradients. Zeros where an expert has no rows: it is touched all the same."""
    grads: list[Tensor | None] = []
    for position, (tensor, needed) in enumerate(zip(tensors, needs, strict=True)):
        make = torch.empty_like if counts[position // stride] else torch.zeros_like
        grads.append(make(tensor) if needed and tensor is not None else None)
    return grads


def _piece(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _linear(x_nD: Tensor, weight_ID: Tensor, bias_I: Tensor | None, out_nI: Tensor) -> None:
    """A linear that writes into given memory."""
    if bias_I is None:
        torch.mm(x_nD, weight_ID.t(), out=out_nI)
    else:
        torch.addmm(bias_I, x_nD, weight_ID.t(), out=out_nI)


def _linear_backward(dy_nI: Tensor, x_nD: Tensor, dweight_ID: Tensor | None, dbias_I: Tensor | None) -> None:
    """The gradients of a linear's weight and bias, into given memory (None: not wanted)."""
    if dweight_ID is not None:
        torch.mm(dy_nI.t(), x_nD, out=dweight_ID)
    if dbias_I is not None:
        torch.sum(dy_nI, 0, out=dbias_I)


def _blocks(*of_rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of the same rows, cut alike into blocks of about `BLOCK` elements."""
    return zip(*(tensor.split(max(BLOCK // of_rows[0].shape[1], 1)) for tensor in of_rows), strict=True)


def _inner(activation: Activation, pre: list[Tensor], out_nI: Tensor) -> None:
    """act(first) [× second], into given memory."""
    for out_bI, first, *second in _blocks(out_nI, *pre):
        _activate(activation, first, out_bI)
        for factor in second:
            out_bI.mul_(factor)


def _inner_backward(
    activation: Activation, pre: list[Tensor], dpre: list[Tensor], inner_nI: Tensor, dgate_n: Tensor
) -> None:
    """The units again, the gradients of `pre`, and Σ dz × units of each row.

    Where the first of `dpre` goes stands dz, the gradient of the units, before.
    """
    for inner_bI, dz_bI, dgate_b, first, *parts in _blocks(inner_nI, dpre[0], dgate_n, *pre, *dpre[1:]):
        if len(pre) == 2:
            second, dsecond = parts
            _activate(activation, first, dsecond)
            torch.mul(dsecond, second, out=inner_bI)
            dsecond.mul_(dz_bI)
            torch.sum(dsecond * second, 1, dtype=dgate_n.dtype, out=dgate_b)
            dz_bI.mul_(second)
        else:
            _activate(activation, first, inner_bI)
            torch.sum(dz_bI * inner_bI, 1, dtype=dgate_n.dtype, out=dgate_b)
        _activation_backward(activation, first, dz_bI)


def _activate(activation: Activation, x: Tensor, out: Tensor) -> None:
    """An elementwise function, into given memory."""
    if type(activation) is nn.SiLU:
        torch.ops.aten.silu.out(x, out=out)
    else:
        out.copy_(activation(x))


def _activation_backward(activation: Activation, x: Tensor, grad: Tensor) -> None:
    """Gradient of an elementwise function, in place of that of its result."""
    if type(activation) is nn.SiLU:
        torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)
        return
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = activation(x)
    grad.copy_(torch.autograd.grad(y, x, grad)[0])
