# SPDX-License-Identifier: Apache-2.0
"""Where the tensors of a layer's experts lie: at equal distances in one memory they are one tensor, without a copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Stacked(torch.autograd.Function):
    """Tensors of one shape as one, without a copy where they lie at equal distances; each gets its own gradient."""

    @staticmethod
    def forward(ctx, *tensors: Tensor) -> Tensor:
        return stacked(tensors)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.unbind(0)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as one [E, …], where they lie if they can be read there."""
    found = in_place(tensors)
    return torch.stack(list(tensors)) if found is None else found


def in_place(tensors: Sequence[Tensor]) -> Tensor | None:
    """The tensors stacked where they are, [E, …]; None where they do not lie at equal distances in one memory."""
    first, offsets = tensors[0], [tensor.storage_offset() for tensor in tensors]
    alike = {(t.untyped_storage().data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors}
    steps = {after - before for before, after in zip(offsets, offsets[1:], strict=False)}
    if len(alike) > 1 or len(steps) > 1 or min(steps, default=1) <= 0 or first.device.type == "meta":
        return None
    # No view of a parameter, which autograd would watch.
    memory = torch.empty(0, dtype=first.dtype, device=first.device)
    distance = next(iter(steps), first.numel())
    return memory.set_(first.untyped_storage(), offsets[0], (len(tensors), *first.shape), (distance, *first.stride()))


@torch.no_grad()
def lie_together(experts: Sequence[nn.Module]) -> None:
    """Moves the parameters of experts that are alike into one memory for each name, where they are not in one already.

    They stay the parameters that they are. Not under DeepSpeed, whose flat buffers they must not leave.
    """
    names = [name for name, _ in experts[0].named_parameters()]
    for name in names:
        parameters = [expert.get_parameter(name) for expert in experts]
        # What is quantised lies as its package has packed it.
        if not parameters[0].is_floating_point() or in_place(parameters) is not None:
            continue
        with torch.inference_mode(False):
            together = torch.stack([parameter.data for parameter in parameters])
        for parameter, place in zip(parameters, together.unbind(0), strict=True):
            parameter.data = place
