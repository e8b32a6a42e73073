# SPDX-License-Identifier: Apache-2.0
"""Smaller sparse models: experts that carry little are dropped, or merged into those that stay.

An expert carries Σ over the tokens that visit it of gate × ‖its output‖₂: what it adds to the residual stream. Merging
takes the mean of the experts of a group, weighed by what each carries; a group is an expert that stays and those whose
router rows are likest to its own, by cosine, as tokens would have come to it (after arXiv:2310.01334).

Legend: T tokens, D hidden, E experts, S = E / G sets of G slices of one MLP (`init granular`; else G = 1).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moellava.errors import UserError
from moellava.moe.decoder import decoder_layers, mlp_names
from moellava.moe.experts import sort_by_expert
from moellava.moe.layer import NativeMoE
from moellava.moe.modes import evaluating
from moellava.moe.spec import MoESpec
from moellava.moe.upcycle import moe_layers, set_routing_context


@dataclass(frozen=True)
class Kept:
    """What a layer keeps.

    Args:
        experts: of its experts, those that stay, by their old index.
        total: how many there were.
        share: what those that stay carried, of all.
    """

    experts: list[int]
    total: int
    share: float

    def line(self, layer: int) -> str:
        """For the terminal."""
        names = ", ".join(map(str, self.experts))
        return f"layer {layer}: keeps {names} of {self.total} experts, which carried {100 * self.share:.1f} %"


@torch.no_grad()
def carried(model: Any, batches: Iterable[dict[str, Tensor]]) -> dict[int, Tensor]:
    """What each expert carries over some batches, as the model answers (without noise and gradient).

    Args:
        model: a sparse model of the native engine.
        batches: inputs of the model, with an attention mask.

    Returns:
        Decoder layer -> [E] in fp64.
    """
    sums: dict[int, Tensor] = {}
    with evaluating(model), _watched(model, sums):
        for batch in batches:
            set_routing_context(model, token_mask=batch["attention_mask"].bool())
            model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
    set_routing_context(model)
    return sums


@contextmanager
def _watched(model: Any, sums: dict[int, Tensor]) -> Iterator[None]:
    """Adds what experts carry in the forwards inside to `sums`."""

    def watch(index: int) -> Any:
        def add(layer: NativeMoE, inputs: tuple[Tensor, ...]) -> None:
            sums[index] = sums.get(index, 0.0) + _carried_by(layer, inputs[0])

        return add

    hooks = [layer.register_forward_pre_hook(watch(index)) for index, layer in moe_layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _carried_by(layer: NativeMoE, hidden_states: Tensor) -> Tensor:
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    routing = layer.route(x_TD, hidden_states.shape[:-1])
    sent = sort_by_expert(routing.choice, routing.gate_Nk, layer.n_experts)
    rows = zip(layer.experts, sent.token_R.split(sent.counts), sent.gate_R.split(sent.counts), strict=True)
    weights = [(gate_n * expert(x_TD[token_n]).float().norm(dim=1)).double().sum() for expert, token_n, gate_n in rows]
    return torch.stack(weights).cpu()


def require_keep(model: Any, keep: int) -> None:
    """Sees to it that a sparse model can do with so many experts in each layer, and that some would go.

    Raises:
        UserError: fewer than a token visits, part of a set of slices, or no fewer than any layer has.
    """
    layers = [layer for _, layer in moe_layers(model)]
    spec, most = layers[0].spec, max(layer.n_experts for layer in layers)
    if keep < spec.top_k_experts or keep % spec.granularity:
        sets = "" if spec.granularity == 1 else f", in whole sets of {spec.granularity} slices"
        raise UserError(f"--keep {keep}: each token visits {spec.top_k_experts} experts; keep at least as many{sets}.")
    if keep >= most:
        raise UserError(f"--keep {keep}: no layer has more than {most} experts, so that none would go.")


def prune(model: Any, carries: dict[int, Tensor], keep: int, merge: bool = False) -> tuple[MoESpec, dict[int, Kept]]:
    """Leaves each sparse layer the experts that carry most, in place.

    Args:
        model: a sparse model of the native engine.
        carries: of `carried`.
        keep: experts that stay in each layer; a layer with fewer keeps them all.
        merge: the others' weights go into those that stay, rather than being lost.

    Returns:
        The options of the smaller model, and what each layer keeps.

    Raises:
        UserError: see `require_keep`.
    """
    require_keep(model, keep)
    sparse = moe_layers(model)
    spec = sparse[0][1].spec
    layers, names = decoder_layers(model), mlp_names(model, [index for index, _ in sparse])
    counts = [min(keep, layer.n_experts) for _, layer in sparse]
    smaller, kept = replace(spec, num_experts=counts), {}
    for index, layer in sparse:
        made, kept[index] = _pruned(layer, carries[index], keep, smaller, merge)
        setattr(layers[index], names[index], made)
    return smaller, kept


@torch.no_grad()
def _pruned(layer: Any, carries_E: Tensor, keep: int, spec: MoESpec, merge: bool) -> tuple[NativeMoE, Kept]:
    size = spec.granularity
    carries_S = carries_E.view(-1, size).sum(1)
    stay = sorted(carries_S.argsort(descending=True, stable=True)[: keep // size].tolist())
    groups = _groups(layer.router.weight.view(len(carries_S), -1).float(), stay) if merge else [[one] for one in stay]
    experts = [
        _merged([layer.experts[one * size + part] for one in group], carries_S[group])
        for group in groups
        for part in range(size)
    ]
    made = layer.with_experts(experts, spec)
    rows = [one * size + part for one in stay for part in range(size)]
    made.router.weight.copy_(layer.router.weight[rows])
    if layer.router.bias is not None:
        made.router.bias.copy_(layer.router.bias[rows])
    share = float(carries_S[stay].sum() / carries_S.sum().clamp_min(torch.finfo(torch.float64).tiny))
    return made, Kept(rows, layer.n_experts, share)


def _groups(rows_SD: Tensor, stay: list[int]) -> list[list[int]]:
    """Each set that stays, with those that go and are likest to it."""
    unit_SD = F.normalize(rows_SD, dim=1)
    groups = {one: [one] for one in stay}
    for one in range(len(rows_SD)):
        if one not in groups:
            groups[stay[int((unit_SD[stay] @ unit_SD[one]).argmax())]].append(one)
    return list(groups.values())


def _merged(experts: list[nn.Module], carries: Tensor) -> nn.Module:
    """The mean of experts, weighed by what they carry (equally where none carries anything)."""
    if len(experts) == 1:
        return experts[0]
    weights = carries / carries.sum() if carries.sum() > 0 else torch.full_like(carries, 1 / len(carries))
    mean = copy.deepcopy(experts[0])
    alike = [dict(expert.named_parameters()) for expert in experts]
    for name, parameter in mean.named_parameters():
        parameter.copy_(sum(float(w) * one[name].float() for w, one in zip(weights, alike, strict=True)))
    return mean
