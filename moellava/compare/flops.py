# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a training step, counted while one runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from moellava.moe import set_routing_context
from moellava.train.loss import SupervisedHead, supervised_positions
from moellava.train.stages import freeze_all_but
from moellava.vlm import VLM

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
LEFT_OUT: dict[Any, Callable[..., int]] = {
    ATTENTION: lambda query, key, value, *rest, **options: sdpa_flop_count(query, key, value),
    ATTENTION_BACKWARD: lambda grad, query, key, value, *rest, **options: sdpa_backward_flop_count(
        grad, query, key, value
    ),
    torch.ops.aten.addmm_: lambda total, one, other, *rest, **options: 2 * one[0] * one[1] * other[1],
}
"""What torch's registry leaves out: attention on a CPU, and products that add to what is there. Shapes -> FLOPs."""


class Whole:
    """In place of what tells a counter which module runs: that looks into the graph, and cannot while a backward calls
    `autograd.grad` itself, as that of `FusedExperts` does."""

    parents = ("Global",)

    def __enter__(self) -> Whole:
        return self

    def __exit__(self, *error: object) -> None:
        pass


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
    supervised = supervised_positions(batch["labels"])
    head = SupervisedHead(model.get_output_embeddings(), model.config.get_text_config().vocab_size)
    set_routing_context(model, token_mask=batch["attention_mask"].bool())
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    counter: Any = FlopCounterMode(display=False, custom_mapping=LEFT_OUT)
    counter.mod_tracker = Whole()
    with counter, head.only(supervised):
        head.loss_sum(model(**inputs, use_cache=False).logits, supervised.target_N).backward()
    set_routing_context(model)
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()
