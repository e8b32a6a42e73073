# SPDX-License-Identifier: Apache-2.0
"""Where each token goes, in any sparse model: the one place where routing is watched.

Layers of ours note each routing in their counters (`RouterStats.add`), which a watch takes the place of. A language
model that is sparse of itself calls its experts with what was chosen, `experts(hidden, index [N, k], weight [N, k])`:
whatever a class calls them, the module of a sparse layer that is given such indices is looked for.

Legend: N tokens (of T = B × L), E experts, k choices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moellava.errors import UserError
from moellava.moe.decoder import decoder_layers
from moellava.moe.layer import RoutedMLP
from moellava.moe.own_routers import has_own_experts
from moellava.moe.router import Routing
from moellava.moe.stats import RouterStats
from moellava.moe.upcycle import counted_routing, moe_layers


@dataclass
class Routed:
    """What one layer has decided in a forward. All tensors are on the CPU.

    Args:
        layer: index of the decoder layer.
        n_experts: E.
        token_N: indices of the tokens among all T; None: they are all.
        expert_Nk: the experts of each token, best first.
        gate_Nk: weights of their outputs.
        kept_Nk: False where an expert was full; None: nothing is dropped.
        entropy_N: entropy of each token's router in nats; None where the router does not show its logits.
    """

    layer: int
    n_experts: int
    token_N: Tensor | None
    expert_Nk: Tensor
    gate_Nk: Tensor
    kept_Nk: Tensor | None
    entropy_N: Tensor | None


@dataclass
class Watch:
    """What the layers of a model decide, from one `take` to the next."""

    seen: list[Routed] = field(default_factory=list)

    def take(self) -> list[Routed]:
        """What the layers have decided since the last call, in the order of the layers."""
        taken, self.seen = sorted(self.seen, key=lambda routed: routed.layer), []
        return taken


class _Noted(RouterStats):
    """Counters that also tell a watch."""

    def __init__(self, layer: int, n_experts: int, watch: Watch):
        super().__init__(n_experts)
        self.layer, self.watch = layer, watch

    @torch.no_grad()
    def add(self, routing: Routing, choices_E: Tensor) -> None:
        """See `RouterStats.add`."""
        choice = routing.choice
        tensors = (choice.token_N, choice.expert_Nk, routing.gate_Nk, choice.kept_Nk, entropy(routing.prob_NE))
        self.watch.seen.append(Routed(self.layer, self.n_experts, *map(_at_rest, tensors)))


@contextmanager
def watched_routing(model: Any) -> Iterator[Watch]:
    """Watches the routers of a sparse model, also in evaluation and without gradient.

    Raises:
        UserError: the model is dense.
    """
    watch, layers = Watch(), moe_layers(model)
    with ExitStack() as stack:
        if layers:
            stack.enter_context(counted_routing(model))
            for index, layer in layers:
                stack.callback(setattr, layer, "stats", layer.stats)
                layer.stats = _Noted(index, layer.n_experts, watch)
        else:
            require_experts(model)
            for index, layer in enumerate(decoder_layers(model)):
                _watch_own(index, layer, watch, stack)
        yield watch


def require_experts(model: Any, called: str | None = None) -> None:
    """Raises UserError for a dense model, by the name that the user called it."""
    if not moe_layers(model) and not has_own_experts(model):
        raise UserError(
            f"{called or type(model).__name__} is dense: it has no experts that a token could go to. `moellava "
            "upcycle` makes a sparse model of it, or stage 3."
        )


def _watch_own(index: int, layer: nn.Module, watch: Watch, stack: ExitStack) -> None:
    """Listens to a layer whose experts nobody here has made."""
    logits: dict[tuple[int, int], Tensor] = {}

    def heard(module: nn.Module, inputs: tuple, options: dict[str, Any]) -> None:
        count, chosen = experts_in(module), choices_in((*inputs, *options.values()))
        if count is None or chosen is None:
            return
        expert_Nk, gate_Nk = chosen
        found = logits.get((len(expert_Nk), count))
        entropy_N = None if found is None else entropy(found.float().softmax(1))
        watch.seen.append(Routed(index, count, None, *map(_at_rest, (expert_Nk, gate_Nk, None, entropy_N))))
        logits.clear()

    def said(module: nn.Module, inputs: tuple, output: Any) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dim() >= 2:
                logits.setdefault((tensor.shape[:-1].numel(), tensor.shape[-1]), tensor.reshape(-1, tensor.shape[-1]))

    for module in layer.modules():
        if module is not layer and not isinstance(module, RoutedMLP):
            stack.callback(module.register_forward_pre_hook(heard, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(said).remove)
    stack.callback(logits.clear)


def choices_in(arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
    """The experts [N, k] and their weights [N, k] among a module's arguments; None where they are not there."""
    tensors = [one for one in arguments if isinstance(one, Tensor) and one.dim() == 2]
    index = next((one for one in tensors if one.dtype in (torch.int32, torch.int64)), None)
    hidden = next((one for one in arguments if isinstance(one, Tensor) and one.is_floating_point()), None)
    if index is None or hidden is None or hidden.shape[:-1].numel() != len(index):
        return None
    weights = [one for one in tensors if one.is_floating_point() and one is not hidden and len(one) == len(index)]
    if not weights:
        return None
    weight = weights[0]
    return index.long(), weight if weight.shape == index.shape else weight.gather(1, index.long())


def experts_in(module: nn.Module) -> int | None:
    """How many experts a module holds, by its own word or by its stacked matrices; None: it holds none."""
    stacked = [parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    named = getattr(module, "num_experts", None)
    return named if isinstance(named, int) else stacked[0] if stacked else None


def entropy(prob_NE: Tensor) -> Tensor:
    """Entropy [N] of distributions, in nats."""
    return -torch.special.xlogy(prob_NE, prob_NE).sum(1)


def _at_rest(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().cpu()


def require_heard(routed: list[Routed], model: Any) -> list[Routed]:
    """What was watched, if anything was. Raises UserError for classes that do not tell their choices."""
    if not routed:
        raise UserError(
            f"The language model ({type(model.get_decoder()).__name__}) has experts, but calls them without the "
            "indices of a token's choices, so its routing cannot be watched."
        )
    return routed
