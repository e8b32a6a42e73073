"""Floating-point operations of a training step, counted while one runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from moellava.moe import set_routing_context
from moellava.train.loss import SupervisedHead, cross_entropy_sum, supervised_positions
from moellava.train.stages import freeze_all_but
from moellava.vlm import VLM

ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *rest, **options: (
        sdpa_flop_count(query.shape, key.shape, value.shape)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, query, key, value, *rest, **o: (
        sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)
    ),
}
"""Attention on a CPU, which torch's registry leaves out: its operation -> FLOPs."""

IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm}
"""Products that add to what is there -> the same operation in the registry."""


class Counting(TorchDispatchMode):
    """Adds up the operations of what runs inside. (`FlopCounterMode` cannot look into a backward that calls
    `autograd.grad` itself, as that of `FusedExperts` does.)

    Attributes:
        flops: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        out, operation = func(*args, **options), IN_PLACE.get(func._overloadpacket, func._overloadpacket)
        if operation in flop_registry:
            self.flops += flop_registry[operation](*args, **options, out_val=out)
        elif operation in ON_CPU:
            self.flops += ON_CPU[operation](*args, **options)
        return out


def step_flops(vlm: VLM, trained: Iterable[nn.Parameter], batch: dict[str, Tensor]) -> int:
    """FLOPs of a forward and a backward over a batch: matrix products and attention, a multiplication and an addition
    each (as `torch.utils.flop_counter` counts them). Elementwise work and the optimizer are not in it.

    Args:
        vlm: the model; which of its parameters take a gradient is changed.
        trained: those that do.
        batch: of its collator, with labels.
    """
    model: Any = vlm.model
    freeze_all_but(model, trained)
    rows, targets = supervised_positions(batch["labels"])
    set_routing_context(model, token_mask=batch["attention_mask"].bool())
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with Counting() as counter, SupervisedHead(model.get_output_embeddings()).only(rows):
        loss = cross_entropy_sum(model(**inputs, use_cache=False).logits, targets)
        loss.backward()
    set_routing_context(model)
    model.zero_grad(set_to_none=True)
    return counter.flops
