# SPDX-License-Identifier: Apache-2.0
"""Sparse upcycling: replaces the MLPs of a decoder by Mixtures of Experts made from them (arXiv:2212.05055)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moellava.errors import UserError
from moellava.moe.context import RoutingContext, checkpoint_contexts
from moellava.moe.decoder import decoder_layers, mlp_names
from moellava.moe.experts import kernel_for
from moellava.moe.layer import NativeMoE, RoutedMLP
from moellava.moe.losses import Reduce, RouterLosses, Total, combine, step_bias
from moellava.moe.mlp import add_noise, check_slices, hidden_size, redraw_units, silence, slice_mlp
from moellava.moe.spec import MoESpec
from moellava.moe.stats import summarise_all

ENGINES = ("native", "deepspeed")


def upcycle(
    model: nn.Module,
    spec: MoESpec,
    *,
    engine: str = "native",
    ep_size: int = 1,
    initialize: bool = True,
    share_copies: bool = False,
) -> nn.Module:
    """Replaces the MLP in the chosen layers of the decoder, in place. HF forwards stay as they are.

    Args:
        model: a Hugging Face model with a decoder (`get_decoder()`); where its MLPs are, see `moe/decoder.py`.
        spec: options.
        engine: 'native' (inference, one process) or 'deepspeed' (training under the `deepspeed` launcher; then call
            this before `deepspeed.initialize`, after `deepspeed.init_distributed`).
        ep_size: ranks that share one set of experts; each then holds experts / ep_size of every layer.
        initialize: False when a state dict follows: experts get the right shapes, and values of no meaning.
        share_copies: experts that are plain copies stay in the memory of the MLP that they are copies of, until
            `separate_experts` gives each its own: a process needs none for experts that go to others.

    Returns:
        The same model.

    Raises:
        UserError: a layer that cannot be cut into experts, is sparse already, or counts that do not fit.
    """
    if engine not in ENGINES:
        raise UserError(f"Unknown engine {engine!r}. Known: {', '.join(ENGINES)}.")
    if engine == "native" and ep_size != 1:
        raise UserError(f"--ep_size {ep_size} needs the deepspeed engine; the native one keeps all experts together.")
    if sparse_modules(model):
        raise UserError("The model is sparse already; only a dense model can be upcycled.")
    layers = decoder_layers(model)
    chosen = spec.layers_of(len(layers))
    names = mlp_names(model, list(chosen))
    for index, n_experts in chosen.items():
        dense = getattr(layers[index], names[index])
        setattr(layers[index], names[index], sparse_mlp(dense, spec, n_experts, index, initialize, share_copies))
    _share_context(model)
    if spec.freeze_router:
        for parameter in router_parameters(model):
            parameter.requires_grad_(False)
    return model if engine == "native" else convert_engine(model, engine, ep_size)


def sparse_mlp(
    mlp: nn.Module,
    spec: MoESpec,
    n_experts: int,
    layer_index: int,
    initialize: bool = True,
    share_copies: bool = False,
) -> NativeMoE:
    """One dense MLP as a native sparse one.

    Args:
        mlp: the dense MLP; it stays as it is.
        spec: options.
        n_experts: experts of this layer.
        layer_index: index of the decoder layer; with `spec.init_seed` it seeds what is drawn.
        initialize, share_copies: see `upcycle`.
    """
    generator = None
    if initialize and next(mlp.parameters()).device.type != "meta":
        generator = torch.Generator().manual_seed(spec.init_seed * 100_003 + layer_index)
    drawn = _draw_routing(spec, n_experts, hidden_size(mlp), generator)
    if generator is not None and spec.granularity > 1:
        check_slices(mlp, spec.granularity)
    experts = [_make_expert(mlp, spec, index, generator) for index in range(n_experts)]
    if _are_aliases(spec) and not share_copies and not next(mlp.parameters()).is_meta:
        experts = [_copied(expert) for expert in experts]
    layer = NativeMoE(experts, spec, hidden_size(mlp), _copied(mlp) if _keeps_mlp(spec) else None)
    if generator is not None:
        layer.load_state_dict(drawn, strict=False)
    return layer.train(mlp.training)


def expert_stream(mlp: nn.Module, spec: MoESpec, n_experts: int, layer_index: int) -> Iterator[tuple[str, Tensor]]:
    """The state dict of `sparse_mlp(mlp, …)` in its order, piece by piece: one expert at a time is in memory."""
    generator = torch.Generator().manual_seed(spec.init_seed * 100_003 + layer_index)
    if spec.granularity > 1:
        check_slices(mlp, spec.granularity)
    drawn = _draw_routing(spec, n_experts, hidden_size(mlp), generator)
    yield from ((part, tensor) for part, tensor in drawn.items() if part.startswith("router."))
    if _keeps_mlp(spec):
        yield from ((f"shared.{part}", tensor) for part, tensor in mlp.state_dict().items())
    yield from ((part, tensor) for part, tensor in drawn.items() if not part.startswith("router."))
    for index in range(n_experts):
        state = _make_expert(mlp, spec, index, generator).state_dict()
        for part in list(state):
            yield f"experts.{index}.{part}", state.pop(part)  # gone before the next expert is made


def _keeps_mlp(spec: MoESpec) -> bool:
    return spec.init == "shared" or spec.use_residual


def _draw_routing(spec: MoESpec, n_experts: int, hidden: int, generator: torch.Generator | None) -> dict[str, Tensor]:
    """Initial router and residual coefficients by name. The slices of one set have equal router rows."""
    if generator is None:
        return {}
    draw = lambda rows: torch.empty(rows, hidden).uniform_(-(hidden**-0.5), hidden**-0.5, generator=generator)  # noqa: E731
    drawn = {"router.weight": draw(n_experts // spec.granularity).repeat_interleave(spec.granularity, dim=0)}
    if spec.router_balance == "bias":
        drawn["router.bias"] = torch.zeros(n_experts)
    if spec.use_residual:
        drawn |= {"coefficient.weight": draw(2), "coefficient.bias": torch.zeros(2)}
    return drawn


@torch.no_grad()
def _make_expert(mlp: nn.Module, spec: MoESpec, index: int, generator: torch.Generator | None) -> nn.Module:
    """Expert `index`: a copy or a slice of the MLP, changed as the recipe says where there is a generator."""
    slices = spec.granularity
    if _are_aliases(spec):
        return _alias(mlp)
    expert = slice_mlp(mlp, index % slices, slices) if slices > 1 else _copied(mlp)
    if generator is not None:
        if spec.init == "noise":
            add_noise(expert, spec.init_noise, generator)
        elif spec.init == "drop":
            redraw_units(expert, spec.init_drop_ratio, generator)
        elif spec.init == "shared":
            silence(expert)
    return expert


def _are_aliases(spec: MoESpec) -> bool:
    return spec.init == "copy" and spec.granularity == 1


def _alias(mlp: nn.Module) -> nn.Module:
    """A copy whose parameters lie where the MLP's do."""
    return _copied(mlp, {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in mlp.parameters()})


def _copied(mlp: nn.Module, same: dict[int, Any] | None = None) -> nn.Module:
    """A copy with the model's config, as all its modules have it: copying that takes longer than all else.

    Args:
        same: id of a part -> what stands in its place.
    """
    config = getattr(mlp, "config", None)
    return copy.deepcopy(mlp, {id(config): config, **(same or {})})


def separate_experts(model: nn.Module) -> None:
    """Gives every expert memory of its own, where `upcycle` has left it in that of another (`share_copies`)."""
    seen: set[int] = set()
    for parameter in routed_expert_parameters(model):
        place = parameter.data_ptr()
        if place and place in seen:
            parameter.data = parameter.data.clone()
        seen.add(place)


def sparse_modules(model: nn.Module) -> list[RoutedMLP]:
    """The sparse layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, RoutedMLP)]


def change_spec(model: nn.Module, spec: MoESpec) -> None:
    """Gives the layers of a sparse model other options, made by `MoESpec.changed`; before an engine takes them over."""
    for layer in sparse_modules(model):
        layer.spec = spec
        layer.router.balance_by_bias(spec.router_balance == "bias")


def moe_layers(model: nn.Module) -> list[tuple[int, RoutedMLP]]:
    """(decoder layer index, sparse MLP) in order; empty for a dense model."""
    if not sparse_modules(model):
        return []
    layers = enumerate(decoder_layers(model))
    return [(index, part) for index, layer in layers for part in layer.children() if isinstance(part, RoutedMLP)]


def _share_context(model: nn.Module) -> None:
    context = RoutingContext()
    for layer in sparse_modules(model):
        layer.context = context


def set_routing_context(
    model: nn.Module,
    token_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    places: Tensor | None = None,
    sequences: tuple[Tensor, int] | None = None,
) -> None:
    """Tells the routers what the next forward holds. Call it before each forward in training.

    Args:
        model: a model; nothing happens if it is dense.
        token_mask: [B, L] bool, True where a token is real. Padding is then excluded from losses, counts and experts.
        image_mask: [B, L] bool, True where an image patch stands; splits the logged load into image and text.
        places: indices [N] of the real tokens among all B × L, in order, where they are known; else the host waits for
            the device once in each forward, to learn how many there are.
        sequences: of several samples in a row, the sample of each real token [N], from 0 on, and how many there are.
            None: every row is one.

    With no masks (as for generation) every token counts.
    """
    for layer in sparse_modules(model):
        layer.context.set(token_mask, image_mask, places, sequences)


@contextmanager
def counted_routing(model: nn.Module) -> Iterator[None]:
    """Has the routers of a sparse model note load and losses in evaluation without gradient, too: where
    `router_metrics` or `router_losses` are asked for, for an answer takes longer. Nothing happens if it is dense."""
    contexts = [layer.context for layer in sparse_modules(model)]
    before = [context.counts_answers for context in contexts]
    for context in contexts:
        context.counts_answers = True
    try:
        yield
    finally:
        for context, counts in zip(contexts, before, strict=True):
            context.counts_answers = counts


def router_losses(model: nn.Module, total_tokens: Total = None, reduce: Reduce | None = None) -> RouterLosses:
    """Losses of the last forward, with gradient. Add `.total` to the cross-entropy.

    Args:
        model: a sparse model, after a forward.
        total_tokens: real tokens (the sum of all attention masks) of the whole optimizer step, over micro-batches and
            ranks. The results are then shares: their sum over micro-batches and ranks is the loss of the step, however
            the batch was split. Scale them as the cross-entropy is scaled when it is a sum divided by the step's
            number of labels. None: means over this forward's own tokens.
        reduce: sums a flat tensor over ranks; used by `router_balance batch` alone, for the load of all ranks.
    """
    layers = sparse_modules(model)
    records = [layer.record for layer in layers if layer.record is not None]
    if not records or len(records) < len(layers):
        raise ValueError(
            "router_losses needs a sparse model that has just run a forward: in training mode, with gradients, or "
            "within counted_routing(model)."
        )
    return combine(records, layers[0].spec, total_tokens, reduce)


def router_metrics(model: nn.Module, reset: bool = True, reduce: Reduce | None = None) -> dict[str, Any]:
    """Load, entropy and dead experts of each layer since the last reset: {"layer_3": {"load": [...], …}, …}.

    Forwards in evaluation mode and without gradient are counted within `counted_routing` alone.

    Args:
        model: a model; {} if it is dense.
        reset: start counting anew.
        reduce: sums a flat float64 tensor over ranks. None: this rank's own counts.
    """
    layers = moe_layers(model)
    if not layers:
        return {}
    device = layers[0][1].router.weight.device
    metrics = summarise_all([(index, layer.stats) for index, layer in layers], device, reduce)
    if reset:
        for _, layer in layers:
            layer.stats.reset()
    return metrics


def update_router_bias(model: nn.Module, reduce: Reduce | None = None) -> None:
    """Moves the selection biases (`router_balance bias`). Call it once after each optimizer step, on every rank.

    Args:
        reduce: sums a flat tensor over ranks; needed with more than one, so that all ranks keep the same bias.
    """
    layers = [layer for layer in sparse_modules(model) if layer.router.bias is not None]
    if not layers:
        return
    zeros = lambda layer: torch.zeros(layer.n_experts, device=layer.router.bias.device)  # noqa: E731
    loads = [zeros(layer) if layer.choices_E is None else layer.choices_E for layer in layers]
    if reduce is not None:
        loads = list(reduce(torch.cat(loads)).split([layer.n_experts for layer in layers]))
    for layer, choices_E in zip(layers, loads, strict=True):
        step_bias(layer.router.bias, choices_E, layer.spec.router_bias_rate)
        layer.choices_E = None


def use_kernel(model: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Chooses what runs the experts of a sparse model.

    Args:
        name: of `moellava.moe.kernels.KERNELS`; 'auto': what fits, decided in each forward.
        device, dtype: where it will run, and of the products.

    Returns:
        The name of what will run, 'auto' being told by what it takes; several where layers differ.

    Raises:
        UserError: an unknown name, or one that cannot run there or these experts.
    """
    layers = sparse_modules(model)
    chosen = [kernel_for(list(layer.local_experts().values()), name, device, dtype) for layer in layers]
    for layer in layers:
        layer.context.kernel = name
    return ", ".join(sorted(set(chosen)))


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the routed experts and of the MLPs that every token visits, of this rank."""
    shared = [layer.shared for layer in sparse_modules(model) if layer.shared is not None]
    return [*routed_expert_parameters(model), *(parameter for mlp in shared for parameter in mlp.parameters())]


def routed_expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the routed experts of this rank."""
    experts = [expert for layer in sparse_modules(model) for expert in layer.local_experts().values()]
    return [parameter for expert in experts for parameter in expert.parameters()]


def router_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the routers and of the residual coefficients."""
    found = []
    for layer in sparse_modules(model):
        found += list(layer.router.parameters())
        if layer.coefficient is not None:
            found += list(layer.coefficient.parameters())
    return found


def enable_gradient_checkpointing(model: nn.Module, contexts: Callable[[], Any] = checkpoint_contexts) -> None:
    """Turns on gradient checkpointing that replays routing, for sparse and dense models.

    Call it after `upcycle`, in place of transformers' own (and leave the Trainer's own flag off). Non-reentrant: the
    reentrant variant runs its first pass without grad, and the routers' losses would get none.

    Args:
        model: of transformers, adapted or not.
        contexts: what layers run in, the first time and again.
    """
    # transformers has called it so since 5.23, and warns of its older name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": contexts})


def disable_gradient_checkpointing(model: nn.Module) -> None:
    """Turns it off."""
    (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()


def convert_engine(model: nn.Module, engine: str, ep_size: int = 1) -> nn.Module:
    """Swaps the engine of every sparse layer in place; values stay the same, names change (`moe/state.py`).

    From 'deepspeed' at ep_size > 1 this is collective: every rank gets all experts.
    """
    if engine not in ENGINES:
        raise UserError(f"Unknown engine {engine!r}. Known: {', '.join(ENGINES)}.")
    layers, sparse = decoder_layers(model), moe_layers(model)
    names = mlp_names(model, [index for index, _ in sparse])
    for index, layer in sparse:
        if engine == "deepspeed" and isinstance(layer, NativeMoE):
            from moellava.moe.deepspeed import to_deepspeed

            setattr(layers[index], names[index], to_deepspeed(layer, ep_size))
        elif engine == "native" and not isinstance(layer, NativeMoE):
            from moellava.moe.deepspeed import to_native

            setattr(layers[index], names[index], to_native(layer))
    return model
