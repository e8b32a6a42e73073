# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a training step, counted while one runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from moellava.moe import set_routing_context
from moellava.plan.counting import Counting
from moellava.train.loss import SupervisedHead, supervised_positions
from moellava.train.stages import freeze_all_but
from moellava.vlm import VLM


def step_flops(vlm: VLM, trained: Iterable[nn.Parameter], batch: dict[str, Tensor]) -> int:
    """FLOPs of a forward and a backward over a batch: matrix products and attention, a multiplication and an addition
    each. Elementwise work and the optimizer are not in it.

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
    with Counting() as counting, head.only(supervised):
        head.loss_sum(model(**inputs, use_cache=False).logits, supervised.target_N).backward()
    set_routing_context(model)
    model.zero_grad(set_to_none=True)
    return counting.flops
