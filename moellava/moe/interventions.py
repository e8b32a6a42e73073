# SPDX-License-Identifier: Apache-2.0
"""What routing is worth: a sparse model whose routers or experts are changed while it is asked, and for that long.

Where an upcycled model is better than its dense control, one wants to know what of it is routing. Each intervention
takes something away that routing gives; a score that stays the same says that nothing was lost by it.

Legend: E experts, S = E / G sets of G slices of one MLP (`init granular`; else G = 1), D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from moellava.errors import UserError
from moellava.moe.decoder import decoder_layers, mlp_names
from moellava.moe.layer import NativeMoE
from moellava.moe.spec import MoESpec
from moellava.moe.upcycle import moe_layers
from moellava.registry import Registry


@dataclass(frozen=True)
class Intervention:
    """One change of every sparse layer.

    Args:
        says: what is changed, in words.
        change: (layer, source of chance) -> a layer that shares what is not changed, in evaluation mode.
        refuses: spec -> why it means nothing for such a model, or None.
    """

    says: str
    change: Callable[[NativeMoE, torch.Generator], NativeMoE]
    refuses: Callable[[MoESpec], str | None] = lambda spec: None


INTERVENTIONS: Registry[Intervention] = Registry("intervention")


@torch.no_grad()
def _of_one_set(layer: NativeMoE, experts: list[nn.Module]) -> NativeMoE:
    """A layer in which every token visits all of `experts`, the G slices of one MLP, each with the same gate 1 / G:
    with the slices' factor G that is the MLP itself."""
    count = len(experts)
    options: dict[str, Any] = {
        "num_experts": [count],
        "top_k_experts": count,
        "drop_tokens": False,
        "second_expert": "top",
    }
    made = layer.with_experts(experts, replace(layer.spec, **options, top1_gate="exact", router_balance="none"))
    made.router.weight.zero_()
    return made


@torch.no_grad()
def shuffled(layer: NativeMoE, generator: torch.Generator) -> NativeMoE:
    """Each set of experts gets the tokens, and the gates, of another set: a random cycle through all sets."""
    size = layer.spec.granularity
    cycle = torch.randperm(layer.n_experts // size, generator=generator)
    source_S = torch.empty_like(cycle)
    source_S[cycle] = cycle.roll(1)
    source_E = (source_S[:, None] * size + torch.arange(size)).flatten().to(layer.router.weight.device)
    made = layer.with_experts(list(layer.experts), layer.spec)
    made.router.weight.copy_(layer.router.weight[source_E])
    if layer.router.bias is not None and made.router.bias is not None:
        made.router.bias.copy_(layer.router.bias[source_E])
    return made


def one_set(layer: NativeMoE, number: int) -> NativeMoE:
    """Every token visits one set of experts, whatever the router says."""
    size = layer.spec.granularity
    return _of_one_set(layer, list(layer.experts)[number * size : (number + 1) * size])


@torch.no_grad()
def averaged(layer: NativeMoE, generator: torch.Generator) -> NativeMoE:
    """One dense MLP whose weights are the mean of all experts' (of the same slice)."""
    size, experts = layer.spec.granularity, list(layer.experts)
    means = []
    for index in range(size):
        mean = copy.deepcopy(experts[index])
        alike = [dict(expert.named_parameters()) for expert in experts[index::size]]
        for name, parameter in mean.named_parameters():
            parameter.copy_(torch.stack([parameters[name].float() for parameters in alike]).mean(0))
        means.append(mean)
    return _of_one_set(layer, means)


@torch.no_grad()
def first_choice(layer: NativeMoE, generator: torch.Generator) -> NativeMoE:
    """Each token visits its best set alone, with the whole weight."""
    options: dict[str, Any] = {"top_k_experts": layer.spec.granularity, "second_expert": "top", "top1_gate": "exact"}
    made = layer.with_experts(list(layer.experts), replace(layer.spec, **options))
    made.router = layer.router
    return made


def _needs_choices(spec: MoESpec) -> str | None:
    return None if spec.top_k_experts > spec.granularity else "its tokens visit one expert anyway"


def _needs_experts(spec: MoESpec) -> str | None:
    return None if min(spec.num_experts) > spec.granularity else "a layer of it has one expert alone"


INTERVENTIONS.register(
    "shuffled", Intervention("routers shuffled: each expert gets another's tokens", shuffled, _needs_experts)
)
INTERVENTIONS.register(
    "one-expert", Intervention("expert 0 alone, for every token", lambda layer, generator: one_set(layer, 0))
)
INTERVENTIONS.register("averaged", Intervention("experts averaged back into one dense MLP", averaged))
INTERVENTIONS.register("top-1", Intervention("each token's first choice alone", first_choice, _needs_choices))


@contextmanager
def intervened(model: Any, name: str, seed: int = 0) -> Iterator[None]:
    """Inside, the sparse layers of a model are changed; afterwards they are what they were.

    Args:
        model: a sparse model of the native engine.
        name: one of `INTERVENTIONS`.
        seed: of what an intervention draws; each layer draws its own.

    Raises:
        UserError: the model is dense, or the intervention would change nothing in it.
    """
    intervention, sparse = INTERVENTIONS[name], moe_layers(model)
    if not sparse:
        raise UserError(f"--intervention {name} changes routers or experts, and this model is dense.")
    reason = intervention.refuses(sparse[0][1].spec)
    if reason is not None:
        raise UserError(f"--intervention {name} ({intervention.says}) means nothing for this model: {reason}.")
    generator = torch.Generator().manual_seed(seed)
    with _in_place_of(model, lambda layer: intervention.change(layer, generator)):
        yield


@contextmanager
def forced(model: Any, number: int) -> Iterator[None]:
    """Inside, every token visits expert `number` (its set of slices) of each sparse layer of a model, and no other."""
    with _in_place_of(model, lambda layer: one_set(layer, number)):
        yield


@contextmanager
def _in_place_of(model: Any, change: Callable[[NativeMoE], NativeMoE]) -> Iterator[None]:
    layers, sparse = decoder_layers(model), moe_layers(model)
    names = mlp_names(model, [index for index, _ in sparse])
    changed = {index: change(layer) for index, layer in sparse if isinstance(layer, NativeMoE)}
    try:
        for index, layer in changed.items():
            setattr(layers[index], names[index], layer)
        yield
    finally:
        for index, layer in sparse:
            setattr(layers[index], names[index], layer)
