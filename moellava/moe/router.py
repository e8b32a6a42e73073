# SPDX-License-Identifier: Apache-2.0
"""Routing: which experts a token visits, and how much each counts. All of it in fp32.

Legend: N real tokens (of T), D hidden, E experts, k choices, S sets of G slices (`init granular`). `x_ND` is tokens ×
hidden.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moellava.moe.spec import MoESpec

TIE = 1e-5
"""Scores of a set's slices that are nearer than this are equal but for rounding, which was 2e-7 at most."""


def is_at_hand(tensor: Tensor) -> bool:
    """Whether the host can read a tensor without waiting for a device. Nobody can while a graph is compiled."""
    return tensor.is_cpu and not torch.compiler.is_compiling()


@dataclass
class Choice:
    """The discrete part of routing, which a recomputed forward reuses.

    Args:
        token_N: indices of the real tokens among all T, or None when all are real.
        expert_Nk: the experts of each token, best first.
        kept_Nk: False where an expert was full; None when nothing is dropped.
        sequence_N: the sequence that each token belongs to.
        image_N: True where the token is an image patch; None when not known.
    """

    token_N: Tensor | None
    expert_Nk: Tensor
    kept_Nk: Tensor | None
    sequence_N: Tensor
    image_N: Tensor | None


@dataclass
class Routing:
    """A choice, and the differentiable numbers around it.

    Args:
        gate_Nk: weight of each chosen expert's output; 0 where it was full.
        prob_NE: softmax of the logits.
        logit_NE: the router's output.
    """

    choice: Choice
    gate_Nk: Tensor
    prob_NE: Tensor
    logit_NE: Tensor


class Router(nn.Module):
    """The linear router of one layer.

    Args:
        hidden: size D of a token.
        n_experts: E.
        balanced_by_bias: keep the selection bias of loss-free balancing (arXiv:2408.15664).

    `weight` [E, D] stays fp32 when the model is bf16: a router in bf16 confuses near ties.
    """

    def __init__(self, hidden: int, n_experts: int, balanced_by_bias: bool, device: torch.device | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, hidden, dtype=torch.float32, device=device))
        self.bias = None
        self.balance_by_bias(balanced_by_bias)

    def balance_by_bias(self, wanted: bool) -> None:
        """Gives it a selection bias of zeros, if it is wanted and there is none."""
        if wanted and self.bias is None:
            del self.bias
            self.register_buffer("bias", torch.zeros(len(self.weight), device=self.weight.device))

    def forward(self, x_TD: Tensor, jitter: float = 0.0, token_N: Tensor | None = None) -> Tensor:
        """Logits [N, E] in fp32, also under autocast.

        Args:
            x_TD: tokens.
            jitter: each input is multiplied by a factor from [1 - jitter, 1 + jitter].
            token_N: indices of those that are routed; None: all.
        """
        device = x_TD.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            if torch.is_grad_enabled() and not jitter and not torch.compiler.is_compiling():
                return RouterLogits.apply(x_TD, self.weight, token_N)
            x_ND = _routed(x_TD, token_N)
            if jitter:
                x_ND = x_ND * torch.empty_like(x_ND).uniform_(1 - jitter, 1 + jitter)
            return F.linear(x_ND, self.weight.float())


class RouterLogits(torch.autograd.Function):
    """A router's linear, which keeps the tokens that others keep, too, and no copy of them in fp32."""

    @staticmethod
    def forward(ctx, x_TD, weight_ED, token_N):
        ctx.save_for_backward(x_TD, weight_ED, token_N)
        return F.linear(_routed(x_TD, token_N), weight_ED.float())

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogit_NE):
        x_TD, weight_ED, token_N = ctx.saved_tensors
        dx_TD, dweight_ED = None, None
        if ctx.needs_input_grad[0]:
            dx_TD = (dlogit_NE @ weight_ED.float()).to(x_TD.dtype)
            dx_TD = dx_TD if token_N is None else torch.zeros_like(x_TD).index_copy_(0, token_N, dx_TD)
        if ctx.needs_input_grad[1]:
            dweight_ED = (dlogit_NE.t() @ _routed(x_TD, token_N)).to(weight_ED.dtype)
        return dx_TD, dweight_ED, None


def _routed(x_TD: Tensor, token_N: Tensor | None) -> Tensor:
    """The tokens that are routed, in fp32."""
    return (x_TD if token_N is None else x_TD.index_select(0, token_N)).float()


def best(score_NE: Tensor, k: int) -> Tensor:
    """Indices [N, k] of the k largest scores, largest first; ties go to the lower index.

    Successive argmax, because the order of ties in `torch.topk` is not defined.
    """
    score_NE = score_NE.clone()
    picks = []
    for _ in range(k):
        picks.append(score_NE.argmax(dim=1, keepdim=True))
        score_NE.scatter_(1, picks[-1], float("-inf"))
    return torch.cat(picks, dim=1)


def whole_sets(score_NE: Tensor, size: int) -> Tensor:
    """Scores in which a set of `size` slices that differ by rounding alone has one score, that of its first slice.

    The slices of an MLP start with equal router rows (`init granular`), but a matrix product may round equal rows
    differently; a score of another set in between would then mix slices of two MLPs.
    """
    if size == 1:
        return score_NE
    score_NSG = score_NE.view(len(score_NE), -1, size)
    first_NS1 = score_NSG[..., :1]
    is_tied_NS1 = ((score_NSG - first_NS1).abs() <= TIE).all(-1, keepdim=True)
    return torch.where(is_tied_NS1, first_NS1, score_NSG).view_as(score_NE)


def select(logit_NE: Tensor, prob_NE: Tensor, bias_E: Tensor | None, spec: MoESpec, training: bool) -> Tensor:
    """The experts [N, k] of each token, best first."""
    if bias_E is not None:
        return best(whole_sets(prob_NE + bias_E, spec.granularity), spec.top_k_experts)
    if spec.second_expert == "sampled" and training:
        first = logit_NE.argmax(dim=1, keepdim=True)
        gumbel = -torch.empty_like(logit_NE).exponential_().log()
        return torch.cat([first, (logit_NE + gumbel).scatter(1, first, float("-inf")).argmax(1, keepdim=True)], dim=1)
    return best(whole_sets(logit_NE, spec.granularity), spec.top_k_experts)


def choose(logit_NE: Tensor, bias_E: Tensor | None, spec: MoESpec) -> tuple[Tensor, Tensor]:
    """The experts [N, k] of each token and their gates [N, k], where nothing is learnt and nothing dropped: as `select`
    and `gates` say, but of the chosen logits alone where that is the same."""
    k = spec.top_k_experts
    if bias_E is None and spec.granularity == 1 and k > 1:
        logit_NE, expert_NE = logit_NE.sort(dim=1, descending=True, stable=True)  # ties as in `best`
        return expert_NE[:, :k], logit_NE[:, :k].softmax(1)
    prob_NE = logit_NE.softmax(1)
    expert_Nk = select(logit_NE, prob_NE, bias_E, spec, training=False)
    return expert_Nk, gates(prob_NE, Choice(None, expert_Nk, None, expert_Nk[:, 0], None), spec)


def capacity(n_tokens: int, n_experts: int, spec: MoESpec, training: bool) -> int:
    """Tokens that one expert takes: the even share times the factor, at least the minimum (arXiv:2006.16668)."""
    factor = spec.capacity_factor if training else spec.eval_capacity_factor
    return max(math.ceil(n_tokens / n_experts * factor * spec.top_k_experts), spec.min_capacity)


def within_capacity(expert_Nk: Tensor, n_experts: int, limit: int) -> Tensor:
    """Where [N, k] an expert has room. First choices enter before second ones, each in the order of the tokens."""
    arrival = F.one_hot(expert_Nk.t().reshape(-1), n_experts)
    place = (arrival.cumsum(0) * arrival).sum(1)
    return (place <= limit).view(expert_Nk.shape[1], -1).t()


def gates(prob_NE: Tensor, choice: Choice, spec: MoESpec) -> Tensor:
    """Weights [N, k] of the chosen experts: probabilities, renormalised over those that were kept.

    With one choice, renormalising would make the weight a constant 1 and starve the router; `top1_gate exact` has the
    same value with the probability's gradient.
    """
    gate_Nk = prob_NE.gather(1, choice.expert_Nk)
    if choice.kept_Nk is not None:
        gate_Nk = gate_Nk * choice.kept_Nk
    if spec.top_k_experts > 1:
        return gate_Nk / gate_Nk.sum(1, keepdim=True).clamp_min(torch.finfo(gate_Nk.dtype).eps)
    if spec.top1_gate == "exact":
        return gate_Nk / prob_NE.detach().gather(1, choice.expert_Nk)
    return gate_Nk
