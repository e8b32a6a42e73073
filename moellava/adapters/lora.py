# SPDX-License-Identifier: Apache-2.0
"""LoRA: which linears get an adapter, that every one of them did, and that all of them learn.

Adapters are peft's layers, put in place of linears of the decoder, the vision encoder or both
(`peft.inject_adapter_in_model`): the model keeps its class, so routing, parts and saving work as they do without. An
adapted linear computes W x + alpha / r · B A x with W frozen; A starts random and B at zero, so the first step starts
from the model as it was (arXiv:2106.09685).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear, LoraLayer
from torch import nn

from moellava.adapters.factors import read_lora
from moellava.errors import UserError
from moellava.model.parts import Keywords, group_of
from moellava.moe import moe_layers
from moellava.moe.adapted import understand
from moellava.vlm import VLM

NAME = "default"
"""peft's name of the one adapter that a model has here."""

understand(Linear, read_lora)

HEAD = "lm_head."
"""What the names of the head's tensors begin with; it is no part of the decoder."""


@dataclass
class Adapter:
    """What was attached to a model, and what trains beside it.

    Args:
        config: peft's description; `modules_to_save` names what is saved whole beside the matrices.
        origin: how the model under the adapter was made; written beside it, read by `moellava merge-lora`.
        keywords: where the model's parts are.
        full: what trains in full.
    """

    config: LoraConfig
    origin: dict[str, Any]
    keywords: Keywords
    full: list[nn.Parameter] = field(default_factory=list)

    @property
    def scaling(self) -> float:
        """Factor of B A."""
        return self.config.lora_alpha / self.config.r

    def trains(self, name: str) -> bool:
        """Whether a tensor, by its name in the native engine's state dict, belongs to the adapter's files."""
        if ".lora_A." in name or ".lora_B." in name:
            return True
        if any(f".{whole}." in f".{name}." for whole in self.config.modules_to_save or ()):
            return True
        if self.config.bias == "lora_only":
            return name.endswith(".base_layer.bias")
        if self.config.bias != "all" or not name.endswith(".bias"):
            return False
        return group_of(name, self.keywords) == "language_model" and not name.startswith(HEAD)


def target_names(vlm: VLM, only_experts: bool) -> list[str]:
    """Names of the linears that get an adapter.

    Args:
        vlm: if it is sparse, with the native engine.
        only_experts: those of the MoE layers (experts and shared MLPs) and no others. Routers never.
    """
    sparse = [layer for _, layer in moe_layers(vlm.model)]
    routing = {id(module) for layer in sparse for part in router_modules(layer) for module in part.modules()}
    linears = linears_in(sparse if only_experts else [vlm.parts["language_model"]])
    return names_of(vlm.model, [linear for linear in linears if id(linear) not in routing])


def vision_target_names(vlm: VLM) -> list[str]:
    """Names of the vision encoder's linears that get an adapter: those of the layers whose output is read."""
    return names_of(vlm.model, linears_in(read_layers(vlm.model, vlm.parts["vision_tower"])))


def linears_in(roots: Iterable[nn.Module]) -> list[nn.Linear]:
    """Every linear in some modules."""
    return [module for root in roots for module in root.modules() if isinstance(module, nn.Linear)]


def read_layers(model: nn.Module, encoder: nn.Module) -> list[nn.Module]:
    """The layers of a vision encoder that have a part in the features.

    LLaVA reads the hidden state before the last layer (`vision_feature_layer` -2; 0 is the embeddings'), or several:
    what lies behind the last one that is read gets no gradient.
    """
    stacks = [module for module in encoder.modules() if isinstance(module, nn.ModuleList) and module is not encoder]
    read = getattr(model.config, "vision_feature_layer", None)
    if read is None:  # Phi-3-Vision's name of it
        read = (getattr(model.config, "img_processor", None) or {}).get("layer_idx")
    states = [read] if isinstance(read, int) else read
    layers = []
    for stack in stacks:
        last = len(stack) if states is None else max(state % (len(stack) + 1) for state in states)
        layers += list(stack[:last])
    return layers


def router_modules(layer: nn.Module) -> list[nn.Module]:
    """What routes in a sparse layer: the router and, of a residual layer, the mixing coefficient."""
    return [part for part in (layer.router, layer.coefficient) if part is not None]


def names_of(model: nn.Module, modules: Iterable[nn.Module]) -> list[str]:
    """Dotted names of modules of a model."""
    wanted = {id(module) for module in modules}
    return [name for name, module in model.named_modules() if id(module) in wanted]


def pattern_of(names: Iterable[str], known: Iterable[str] = ()) -> str:
    """A regular expression for names: one line of config for a thousand experts, which differ in their numbers only.

    Args:
        names: what it matches.
        known: what else there is, and what it must not match. Where any number would do too much, names are spelled
            out: an encoder whose last layer is not read.
    """
    others = set(known) - set(names := list(names))
    any_number = {name: re.sub(r"(?<=\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in names}
    too_wide = {wide for wide in set(any_number.values()) if any(re.fullmatch(wide, other) for other in others)}
    return "|".join(sorted({re.escape(name) if wide in too_wide else wide for name, wide in any_number.items()}))


def attach(model: nn.Module, config: LoraConfig, targets: Iterable[str] | None = None) -> None:
    """Puts adapters into a model, in place.

    Args:
        model: the native engine's; `convert_engine` afterwards marks expert adapters as DeepSpeed wants them.
        config: peft's; what it names in `modules_to_save` trains where it is and is not copied.
        targets: names that must be adapted, no more and no fewer. None: whatever the config's pattern finds.

    Raises:
        UserError: peft left a target out, or adapted something else.
    """
    injected = LoraConfig(**{**config.to_dict(), "modules_to_save": None})
    inject_adapter_in_model(injected, model, adapter_name=NAME)
    found, wanted = {name for name, _ in lora_layers(model)}, set(targets or ())
    if targets is not None and found != wanted:
        raise UserError(
            f"peft adapted {len(found)} linears where {len(wanted)} were meant. "
            f"Left out: {shown(wanted - found)}. Not meant: {shown(found - wanted)}."
        )
    cast_adapters(model)


def shown(names: set[str]) -> str:
    """The first few of some names."""
    return ", ".join(sorted(names)[:4]) + (" …" if len(names) > 4 else "") if names else "none"


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """(name, adapted linear) of a model, in order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapted linear."""
    return [matrix.weight for _, layer in lora_layers(model) for matrix in (layer.lora_A[NAME], layer.lora_B[NAME])]


def cast_adapters(model: nn.Module) -> None:
    """Keeps adapters in fp32 beside 16-bit weights: steps of 1e-5 vanish in bf16. DeepSpeed keeps its own fp32 copy."""
    for parameter in lora_parameters(model):
        parameter.data = parameter.data.float()


def trainable_parameters(vlm: VLM, adapter: Adapter) -> list[nn.Parameter]:
    """What trains: adapters, the biases that --lora_bias names, and what trains in full."""
    chosen = lora_parameters(vlm.model) + adapter.full
    if adapter.config.bias == "lora_only":
        chosen += [layer.base_layer.bias for _, layer in lora_layers(vlm.model) if layer.base_layer.bias is not None]
    elif adapter.config.bias == "all":
        decoder = vlm.parts["language_model"]
        chosen += [parameter for name, parameter in decoder.named_parameters() if name.endswith("bias")]
    return chosen
