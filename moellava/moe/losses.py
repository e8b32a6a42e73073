# SPDX-License-Identifier: Apache-2.0
"""Losses and counts of the routers.

Legend: N real tokens, E experts, k choices, S sequences.

With f_e the fraction of the N·k choices that fell on expert e and P_e the mean probability of e, the balancing loss
of a layer is  E · Σ_e f_e P_e  (Switch, arXiv:2101.03961, eq. 4-6): 1.0 when the load is even.

A loss is kept as a sum over tokens and divided by the tokens of the whole optimizer step, so that the shares of
micro-batches and ranks add up to what one big batch gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from moellava.moe.router import Routing, is_at_hand
from moellava.moe.spec import MoESpec

Reduce = Callable[[Tensor], Tensor]
"""Takes a flat tensor of counts and returns its sum over ranks."""


Total: TypeAlias = float | Tensor | None
"""Tokens of an optimizer step; on a GPU a tensor, for which the host need not wait."""


@dataclass
class LayerRecord:
    """What one layer's router leaves behind in a forward.

    Args:
        n_tokens: N.
        choices_E: how often each expert was chosen.
        prob_E: sum of the probabilities over tokens, with gradient.
        aux: Σ over tokens of the balancing loss, with gradient; None where it needs the counts of all ranks.
        z: Σ over tokens of logsumexp(logits)², with gradient.
    """

    n_tokens: int
    choices_E: Tensor
    prob_E: Tensor
    aux: Tensor | None
    z: Tensor


@dataclass
class RouterLosses:
    """Losses of all layers.

    Args:
        aux: balancing loss over layers, without its coefficient; 1.0 (per layer) when the load is even.
        z: z-loss over layers, without its coefficient.
        aux_per_layer, z_per_layer: the same for each layer, in order.
        total: what is added to the cross-entropy: both with their coefficients.
    """

    aux: Tensor
    z: Tensor
    aux_per_layer: list[Tensor]
    z_per_layer: list[Tensor]
    total: Tensor


def count_choices(expert_Nk: Tensor, n_experts: int) -> Tensor:
    """How often each expert was chosen, [E] float."""
    return tally(expert_Nk.reshape(-1), n_experts).float()


def tally(index_R: Tensor, size: int) -> Tensor:
    """How often each index below `size` comes up, [size] int64. On a GPU, `bincount` would have the host wait."""
    if is_at_hand(index_R):
        return torch.bincount(index_R, minlength=size)
    return torch.zeros(size, dtype=torch.long, device=index_R.device).scatter_add_(0, index_R, torch.ones_like(index_R))


def sequence_balance(routing: Routing, n_sequences: int) -> Tensor:
    """Σ over sequences of (its tokens × its balancing loss).

    The sequence-wise loss of DeepSeek-V3 (arXiv:2412.19437, eq. 17-20) with softmax probabilities. As a sum over
    sequences it does not depend on how they are dealt out to micro-batches and ranks.
    """
    n_experts, k = routing.prob_NE.shape[1], routing.choice.expert_Nk.shape[1]
    sequence_N = routing.choice.sequence_N
    prob_SE = routing.prob_NE.new_zeros(n_sequences, n_experts).index_add(0, sequence_N, routing.prob_NE)
    slot = sequence_N.repeat_interleave(k) * n_experts + routing.choice.expert_Nk.reshape(-1)
    choices_SE = tally(slot, n_sequences * n_experts).view(n_sequences, n_experts)
    tokens_S1 = (choices_SE.sum(1, keepdim=True) / k).clamp_min(1)
    return n_experts / k * (choices_SE / tokens_S1 * prob_SE).sum()


def first_choice_balance(routing: Routing) -> Tensor:
    """N × E · Σ_e P_e · (fraction of first choices on e): the original's loss, over whatever tokens it is shown."""
    n_tokens, n_experts = routing.prob_NE.shape
    first_E = count_choices(routing.choice.expert_Nk[:, 0], n_experts) / max(n_tokens, 1)
    return n_experts * (first_E * routing.prob_NE.sum(0)).sum()


def record_layer(routing: Routing, n_sequences: int, spec: MoESpec) -> LayerRecord:
    """Sums up one layer's forward."""
    n_tokens, n_experts = routing.prob_NE.shape
    if spec.router_balance == "batch":
        aux = None
    elif spec.router_balance == "first_choice":
        aux = first_choice_balance(routing)
    else:
        aux = sequence_balance(routing, n_sequences)
    return LayerRecord(
        n_tokens=n_tokens,
        choices_E=count_choices(routing.choice.expert_Nk, n_experts),
        prob_E=routing.prob_NE.sum(0),
        aux=aux,
        z=routing.logit_NE.logsumexp(1).square().sum(),
    )


def combine(
    records: list[LayerRecord], spec: MoESpec, total_tokens: Total = None, reduce: Reduce | None = None
) -> RouterLosses:
    """Losses of one micro-batch on one rank, from the records of its layers.

    Args:
        records: one per sparse layer.
        spec: coefficients and pooling.
        total_tokens: real tokens of the whole optimizer step over all micro-batches and ranks; the results are then
            shares that add up to the loss of the step. None: this forward's own tokens.
        reduce: sums counts over ranks, for `router_balance batch`. None: this rank alone.
    """
    aux_per_layer, z_per_layer = [], []
    for record, choices_E in zip(records, reduced_loads(records, reduce), strict=True):
        tokens = max(record.n_tokens, 1) if total_tokens is None else total_tokens
        aux = record.aux
        if aux is None:
            share_E = choices_E / choices_E.sum().clamp_min(1)
            aux = len(share_E) * (share_E * record.prob_E).sum()
        aux_per_layer.append(aux / tokens)
        z_per_layer.append(record.z / tokens)
    pool = torch.mean if spec.aux_over_layers == "mean" else torch.sum
    aux, z = pool(torch.stack(aux_per_layer)), pool(torch.stack(z_per_layer))
    total = torch.zeros_like(aux)
    if not spec.freeze_router:  # with the router fixed, these would only push the hidden states about
        total = spec.router_z_loss_coef * z
        if spec.router_balance in ("sequence", "batch", "first_choice"):
            total = total + spec.router_aux_loss_coef * aux
    return RouterLosses(aux, z, aux_per_layer, z_per_layer, total)


def reduced_loads(records: list[LayerRecord], reduce: Reduce | None) -> list[Tensor]:
    """The choices [E] of each layer, summed over ranks by one call of `reduce`."""
    loads = [record.choices_E for record in records]
    if reduce is not None:
        loads = list(reduce(torch.cat(loads)).split([len(load) for load in loads]))
    return loads


@torch.no_grad()
def step_bias(bias_E: Tensor, choices_E: Tensor, rate: float) -> None:
    """Moves the selection bias: b_e += rate · sign(mean load - load_e) (arXiv:2408.15664, alg. 1)."""
    bias_E += rate * torch.sign(choices_E.mean() - choices_E)
