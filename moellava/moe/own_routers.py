# SPDX-License-Identifier: Apache-2.0
"""Language models that have experts of their own (Mixtral, OLMoE, Qwen3-MoE …): their balancing loss and their load.

Hugging Face's LLaVA calls the decoder alone, so the loss that its causal language model would add is lost. Here the
decoder is asked for its routers' logits, and the class's own `load_balancing_loss_func` says what they cost. Where the
class has none (DeepSeek-V2, GLM-4.5, Llama 4 …), Mixtral's does, if a run asks for it.

Legend: N real tokens, E experts, k choices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moellava.moe.decoder import decoder_layers, is_sparse
from moellava.moe.losses import Reduce, count_choices
from moellava.moe.router import Choice, Routing
from moellava.moe.stats import RouterStats, summarise_all

LOSS = "load_balancing_loss_func"
"""What transformers calls the function, in the module of each class that has one."""

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
"""What causal language models call the loss's weight."""

CHOICES = ("num_experts_per_tok", "moe_topk", "moe_top_k")
"""What configs call k."""

LOGITS = "router_logits"
"""What decoders call the logits of their routers."""


@dataclass(frozen=True)
class OwnBalance:
    """The balancing loss of a language model that has experts of its own.

    Args:
        function: (logits of all routers, E, k, attention mask [B, L]) -> scalar; k when the load is even.
        k: experts that a token visits.
        coefficient: its weight beside the cross-entropy.
        is_own: whether the model's class has it.
    """

    function: Callable[..., Any]
    k: int
    coefficient: float
    is_own: bool = True


def has_own_experts(model: Any) -> bool:
    """Whether layers of a model's decoder have experts that nobody here has made."""
    if hasattr(sys.modules[type(model.get_decoder()).__module__], LOSS):
        return True  # Dbrx, whose experts are rows of one matrix
    return any(is_sparse(layer) for layer in decoder_layers(model))


def own_balance(decoder: Any) -> OwnBalance | None:
    """The balancing loss of a decoder's causal language model; None where its class has none."""
    function = getattr(sys.modules[type(decoder).__module__], LOSS, None)
    if function is None or type(decoder.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    with torch.device("meta"):
        whole = MODEL_FOR_CAUSAL_LM_MAPPING[type(decoder.config)](decoder.config)
    named = [getattr(whole, name) for name in COEFFICIENTS if hasattr(whole, name)]
    if not named or not hasattr(whole, "num_experts"):
        return None
    return OwnBalance(function, whole.num_experts_per_tok, float(named[0]))


def choices_of(config: Any) -> Any:
    """What the config of a language model calls k: a number, or one for each layer; 0 where it says none."""
    return next((value for name in CHOICES if (value := getattr(config, name, None)) is not None), 0)


def usual_balance(decoder: Any, coefficient: float) -> OwnBalance | None:
    """Mixtral's balancing loss (Switch, arXiv:2101.03961, eq. 4-6) for a decoder whose class has none.

    It takes the k largest logits for the choice, and their softmax for probabilities: what a router adds to its logits
    before it chooses (DeepSeek-V3's bias and groups) does not count.

    Returns:
        None where the decoder does not hand out its routers' logits, or k differs from layer to layer.
    """
    named = choices_of(decoder.config)
    counts = set(named) if isinstance(named, list | tuple) else {named}
    recorded = getattr(decoder, "_can_record_outputs", None) or {}
    if LOGITS not in recorded or not named or len(counts) != 1:
        return None
    return OwnBalance(load_balancing_loss_func, counts.pop(), coefficient, is_own=False)


def balance_of(decoder: Any, coefficient: float | None = None) -> OwnBalance | None:
    """The balancing loss of a decoder with a weight that was given, or with its own; None: there is none."""
    own = own_balance(decoder)
    if coefficient is None:
        return own
    return usual_balance(decoder, coefficient) if own is None else replace(own, coefficient=coefficient)


class OwnRouters:
    """Watches the routers of such a model while it trains.

    Args:
        model: a vision-language model.
        coefficient: the weight of its balancing loss; None: its class's own loss with its own weight, if it has one.

    Attributes:
        balance: the loss; None where there is none.
    """

    def __init__(self, model: Any, coefficient: float | None = None):
        self.decoder, self.layers = model.get_decoder(), decoder_layers(model)
        self.balance = balance_of(self.decoder, coefficient)
        self.stats: list[RouterStats] = []
        self._logits: tuple[Tensor, ...] = ()
        if self.balance is not None:
            self.decoder.register_forward_pre_hook(self._ask, with_kwargs=True)
            self.decoder.register_forward_hook(self._note)

    def _ask(self, decoder: nn.Module, inputs: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return inputs, options | ({"output_router_logits": True} if decoder.training else {})

    def _note(self, decoder: nn.Module, inputs: tuple, output: Any) -> Any:
        given = getattr(output, LOGITS, None) if decoder.training else None
        self._logits = tuple(logits for logits in given or () if logits is not None)
        # The class of the whole hands on all that its decoder returns, and most have no field for what was asked here.
        return type(output)(**{name: value for name, value in output.items() if name != LOGITS}) if given else output

    @property
    def coefficient(self) -> float:
        """The weight of the loss beside the cross-entropy; 0 where the decoder is frozen, since a balancing loss would
        only push the projector about."""
        return self.balance.coefficient if self.balance is not None and self.trains else 0.0

    @property
    def trains(self) -> bool:
        """Whether the decoder learns: its layers do, and not only the embeddings of new words (stage 1)."""
        return any(parameter.requires_grad for parameter in self.layers.parameters())

    def loss(self, attention_mask: Tensor, image_mask: Tensor) -> Tensor:
        """The balancing loss of the last forward, a mean over its real tokens, with gradient; also counts the load.

        Args:
            attention_mask: [B, L], as the model got it.
            image_mask: [B, L] bool, True where an image patch stands.
        """
        assert self.balance is not None
        self._count(attention_mask.bool(), image_mask)
        if not self._logits:
            return torch.zeros((), device=attention_mask.device)
        return self.balance.function(self._logits, self._logits[0].shape[-1], self.balance.k, attention_mask)

    @torch.no_grad()
    def _count(self, token_mask: Tensor, image_mask: Tensor) -> None:
        assert self.balance is not None
        real = token_mask.reshape(-1)
        if not self.stats:
            self.stats = [RouterStats(logits.shape[-1]) for logits in self._logits]
        for stats, logits in zip(self.stats, self._logits, strict=True):
            logit_NE = logits.detach().reshape(-1, logits.shape[-1]).float()[real.to(logits.device)]
            expert_Nk = logit_NE.topk(self.balance.k, dim=-1).indices
            image_N = image_mask.reshape(-1)[real].to(logits.device)
            choice = Choice(None, expert_Nk, None, torch.zeros_like(expert_Nk[:, 0]), image_N)
            routing = Routing(choice, torch.ones_like(expert_Nk, dtype=torch.float32), logit_NE.softmax(1), logit_NE)
            stats.add(routing, count_choices(expert_Nk, logits.shape[-1]))

    def metrics(self, device: torch.device, reduce: Reduce | None = None) -> dict[str, Any]:
        """Load, entropy and dead experts of each router since the last call, as `router_metrics` has them."""
        metrics = summarise_all(list(enumerate(self.stats)), device, reduce)
        for stats in self.stats:
            stats.reset()
        return metrics
