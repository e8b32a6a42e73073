# SPDX-License-Identifier: Apache-2.0
"""The sparse MLP, tensor in, tensor out: what both engines share, and the native engine.

Legend: B sequences, L positions, T = B × L tokens, N real tokens, D hidden, E experts, k choices.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from moellava.moe.adapted import adapted_of
from moellava.moe.context import RoutingContext, decide
from moellava.moe.experts import run_experts, sort_by_expert
from moellava.moe.few_tokens import FEW, run_few
from moellava.moe.losses import LayerRecord, record_layer
from moellava.moe.places import lie_together
from moellava.moe.router import Choice, Router, Routing, capacity, choose, gates, is_at_hand, select, within_capacity
from moellava.moe.spec import MoESpec
from moellava.moe.stats import RouterStats
from moellava.moe.weights import tensors_of


class RoutedMLP(nn.Module):
    """A drop-in for a decoder layer's `mlp`: routes each token to k experts and adds their weighted outputs.

    Attributes:
        spec: options.
        n_experts: E, over all ranks.
        hidden: D.
        router: the linear router.
        context: masks of the batch, shared by all layers of the model.
        record: sums of the last forward, read by `router_losses`; None where it was not counted.
        stats: counters for the log.
        choices_E: choices since the balancing bias last moved.
        shared: an MLP that every token visits (residual MoE, shared expert), or None.
        coefficient: [2, D] linear whose softmax mixes routed and shared output (residual MoE), or None.
    """

    spec: MoESpec
    n_experts: int
    hidden: int
    router: Router
    context: RoutingContext
    record: LayerRecord | None
    stats: RouterStats
    choices_E: Tensor | None
    shared: nn.Module | None
    coefficient: nn.Linear | None

    def _start(self, spec: MoESpec, n_experts: int, hidden: int, shared: nn.Module | None, like: Tensor) -> None:
        """Sets everything but the experts; `like` has the device and dtype of their weights."""
        self.spec, self.n_experts, self.hidden = spec, n_experts, hidden
        self.router = Router(hidden, n_experts, spec.router_balance == "bias", like.device)
        self.context, self.record, self.choices_E = RoutingContext(), None, None
        self.stats = RouterStats(n_experts)
        self.shared, self.coefficient = shared, None
        if spec.use_residual:
            self.coefficient = nn.Linear(hidden, 2, device=like.device, dtype=like.dtype)

    @abstractmethod
    def local_experts(self) -> dict[int, nn.Module]:
        """The experts of this rank by global index."""

    @abstractmethod
    def run(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Σ over chosen experts of gate × expert(x), [T, D]; zero where a token is padding."""

    def routed(self, x_TD: Tensor, shape: torch.Size) -> Tensor:
        """What the experts of each token say, weighed: [T, D]. See `route`."""
        return self.run(x_TD, self.route(x_TD, shape))

    @property
    def is_counted(self) -> bool:
        """Whether somebody wants to know of this forward: it is learnt from, or `counted_routing` asks."""
        return self.training or torch.is_grad_enabled() or self.context.counts_answers

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and copied: all but the last forward's losses, which hang on its graph."""
        return {**self.__dict__, "record": None}

    def hand_over(self, other: RoutedMLP) -> RoutedMLP:
        """Gives router, context and counters to a layer of another engine, and returns it."""
        other.router, other.coefficient, other.context = self.router, self.coefficient, self.context
        other.stats, other.record, other.choices_E = self.stats, self.record, self.choices_E
        return other.train(self.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, L, D] or [T, D] -> the same shape."""
        shape = hidden_states.shape
        x_TD = hidden_states.reshape(-1, shape[-1])
        out_TD = self.routed(x_TD, shape[:-1] if len(shape) == 3 else torch.Size((1, shape[0])))
        if self.coefficient is not None and self.shared is not None:
            mix_T2 = self.coefficient(x_TD).softmax(-1)
            out_TD = out_TD * mix_T2[:, :1] + self.shared(x_TD) * mix_T2[:, 1:]
        elif self.shared is not None:
            out_TD = out_TD + self.shared(x_TD)
        return out_TD.view(shape)

    def route(self, x_TD: Tensor, shape: torch.Size) -> Routing:
        """Chooses experts and notes losses and counts.

        Args:
            x_TD: tokens.
            shape: [B, L] that T stands for.
        """
        spec = self.spec
        pads = spec.router_balance == "first_choice"  # the original routes and counts padding like any token
        tokens, _ = decide(lambda: self.context.tokens(shape, x_TD.device, with_padding=pads))
        logit_NE = self.router(x_TD, spec.router_jitter if self.training else 0.0, tokens.token_N)
        prob_NE = logit_NE.softmax(1)
        (expert_Nk, kept_Nk), is_replay = decide(lambda: self._select(logit_NE.detach(), prob_NE.detach()))
        choice = Choice(tokens.token_N, expert_Nk, kept_Nk, tokens.sequence_N, tokens.image_N)
        routing = Routing(choice, gates(prob_NE, choice, spec), prob_NE, logit_NE)
        if not self.is_counted:
            self.record = None
            return routing
        # In a replay too, whose graph must be that of the first run.
        record = record_layer(routing, tokens.n_sequences, spec)
        if not is_replay:
            self._note(routing, record)
        return routing

    def _select(self, logit_NE: Tensor, prob_NE: Tensor) -> tuple[Tensor, Tensor | None]:
        """The experts of each token, and which of them have room (None: all)."""
        expert_Nk = select(logit_NE, prob_NE, self.router.bias, self.spec, self.training)
        if not self.spec.drop_tokens:
            return expert_Nk, None
        limit = capacity(len(expert_Nk), self.n_experts, self.spec, self.training)
        return expert_Nk, within_capacity(expert_Nk, self.n_experts, limit)

    def _may_drop(self, n_tokens: int) -> bool:
        """Whether so many tokens may be more than an expert has room for; one token's choices differ."""
        return self.spec.drop_tokens and capacity(n_tokens, self.n_experts, self.spec, self.training) < n_tokens

    def _note(self, routing: Routing, record: LayerRecord) -> None:
        self.record = record
        self.stats.add(routing, record.choices_E)
        if self.router.bias is not None and self.training:
            self.choices_E = record.choices_E if self.choices_E is None else self.choices_E + record.choices_E


class NativeMoE(RoutedMLP):
    """The engine of inference and of single-process training: pure PyTorch, dropless, no collectives.

    Args:
        experts: the experts, in order.
        spec: options.
        hidden: size D of a token.
        shared: an MLP that every token visits, or None.

    Parameters: `router.weight`, `experts.{e}.…`, `shared.…`, `coefficient.…`.

    Attributes:
        is_together: whether the experts' weights have been moved into one memory (`lie_together`), which the first
            forward on a GPU does.
    """

    def __init__(self, experts: list[nn.Module], spec: MoESpec, hidden: int, shared: nn.Module | None = None):
        super().__init__()
        like = next(experts[0].parameters())
        self._start(spec, len(experts), hidden, shared, like)
        self.experts = nn.ModuleList(experts)
        self.is_together = False

    def local_experts(self) -> dict[int, nn.Module]:
        return dict(enumerate(self.experts))

    def with_experts(self, experts: list[nn.Module], spec: MoESpec) -> NativeMoE:
        """A layer of other experts, around what this one has beside them; its router is new, and of no meaning yet."""
        made = NativeMoE(experts, spec, self.hidden, self.shared)
        made.coefficient, made.context = self.coefficient, self.context
        return made.train(self.training)

    def routed(self, x_TD: Tensor, shape: torch.Size) -> Tensor:
        is_step = len(x_TD) <= FEW and is_at_hand(x_TD) and self.context.token_mask is None
        if self.is_counted or not is_step or self._may_drop(len(x_TD)):
            return super().routed(x_TD, shape)
        if self.record is not None:  # setting what a module has takes long
            self.record = None
        return run_few(list(self.experts), x_TD, *choose(self.router(x_TD), self.router.bias, self.spec))

    def run(self, x_TD: Tensor, routing: Routing) -> Tensor:
        experts = list(self.experts)
        if x_TD.is_cuda and not self.is_together and not torch.compiler.is_compiling():
            self.is_together = tensors_of(experts) is not None or adapted_of(experts) is not None
            if self.is_together:
                lie_together(experts)
        dispatch = sort_by_expert(routing.choice, routing.gate_Nk, self.n_experts)
        return run_experts(experts, x_TD, dispatch, self.context.kernel)
