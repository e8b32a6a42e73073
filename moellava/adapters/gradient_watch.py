# SPDX-License-Identifier: Apache-2.0
"""That adapters learn: the gradients of the first step, looked at before the optimizer uses them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from moellava.adapters.lora import NAME, lora_layers, shown
from moellava.errors import UserError
from moellava.moe import moe_layers
from moellava.processes import sum_over_processes

NOT_EACH = re.compile(r"\.lora_A\.|\.experts\.")
"""Names of parameters that are not judged one by one."""

DECODER, VISION, WHOLE = "decoder", "vision encoder", "trained in full"
"""What a watched part is: an adapter of the one or the other, or a parameter."""


class GradientWatch(TrainerCallback):
    """Stops a run in its first step if a part that should train gets no gradient.

    Every trainable parameter has to be reached by the backward, and every B needs a gradient that is not zero (A has
    none yet, while B is zero). Experts are judged by the layer: one that no token has chosen rightly gets zeros.
    Adapters of the vision encoder, and of layers that read it through cross-attention, all get zeros in a step without
    any image, so they are watched until one comes.

    Args:
        model: with adapters, the engine chosen.
        encoder: its vision encoder. What trains there in full is not watched: layers behind the one that is read
            rightly get no gradient.
        is_idle: whether a step has had nothing to train on, so that every gradient is 0 rightly.
    """

    def __init__(self, model: nn.Module, encoder: nn.Module | None = None, is_idle: Callable[[], bool] = lambda: False):
        self.is_idle = is_idle
        self.sorts: dict[str, str] = {}
        self.counts: dict[str, torch.Tensor] = {}
        self.handles: dict[str, list[Any]] = {}
        self.sharded: dict[str, list[nn.Parameter]] = {}  # FSDP2 calls no hooks of what it shards
        # Cross-attention layers (Llama 3.2 Vision) see nothing in a step without images either.
        readers = [layer for layer in model.modules() if hasattr(layer, "cross_attn")]
        read_images = [*readers, *([encoder] if encoder else [])]
        in_vision = {id(module) for part in read_images for module in part.modules()}
        unwatched = {id(parameter) for parameter in encoder.parameters()} if encoder else set()
        expert_of = {
            id(module): f"the experts of layer {index}"
            for index, layer in moe_layers(model)
            for expert in layer.local_experts().values()
            for module in expert.modules()
        }
        adapters = {}
        for name, layer in lora_layers(model):
            sort = VISION if id(layer) in in_vision else DECODER
            adapters[id(layer.lora_B[NAME].weight)] = (expert_of.get(id(layer), name), sort)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) in adapters:
                self._watch(parameter, *adapters[id(parameter)])
            elif parameter.requires_grad and id(parameter) not in unwatched and not NOT_EACH.search(name):
                self._watch(parameter, name, WHOLE)

    def _watch(self, parameter: nn.Parameter, part: str, sort: str) -> None:
        self.sorts[part] = sort
        self.counts.setdefault(part, torch.zeros(2, device=parameter.device))

        handles = self.handles.setdefault(part, [])
        if isinstance(parameter, DTensor):
            self.sharded.setdefault(part, []).append(parameter)
        else:
            handles.append(parameter.register_hook(lambda gradient: self._note(part, gradient)))

    def _note(self, part: str, gradient: torch.Tensor) -> None:
        seen = torch.stack([torch.ones((), device=gradient.device), gradient.any().float()])
        self.counts[part] = self.counts[part].to(gradient.device) + seen

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Judges the gradients so far, of all processes together, and stops watching the parts that are judged."""
        if not self.handles or self.is_idle():
            return
        for part, parameters in self.sharded.items():
            for gradient in [parameter.grad for parameter in parameters if parameter.grad is not None]:
                self._note(part, gradient.to_local())
        sums = sum_over_processes(torch.stack(list(self.counts.values())).double()).tolist()
        reached = {part for part, (calls, _) in zip(self.counts, sums, strict=True) if calls}
        moved = {part for part, (_, alive) in zip(self.counts, sums, strict=True) if alive}
        vision = {part for part, sort in self.sorts.items() if sort == VISION}
        waiting = set() if vision & moved else vision & reached
        dead = {part for part in self.counts if part not in (reached if self.sorts[part] == WHOLE else moved)} - waiting
        if dead:
            raise UserError(
                f"In the first step no gradient has reached {len(dead)} of {len(sums)} trained parts: {shown(dead)}. "
                "They would stay as they are, so the run stops here."
            )
        for part in [part for part in self.counts if part not in waiting]:
            for handle in self.handles.pop(part):
                handle.remove()
            self.sharded.pop(part, None)
            del self.counts[part], self.sorts[part]
