"""LoRA: which linears get an adapter, that every one of them did, and that all of them learn.

Adapters are peft's layers, put in place of linears of the decoder, the vision encoder or both
(`peft.inject_adapter_in_model`): the model keeps its class, so routing, parts and saving work as they do without. An
adapted linear computes W x + alpha / r · B A x with W frozen; A starts random and B at zero, so the first step starts
from the model as it was (arXiv:2106.09685).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from moellava.errors import UserError
from moellava.model.builder import parts_of
from moellava.moe import moe_layers
from moellava.train.arguments import ModelArguments, MoEArguments, TrainingArguments
from moellava.train.memory import zero_stage
from moellava.train.stages import FINETUNE, beside_experts

NAME = "default"
"""peft's name of the one adapter that a model has here."""


@dataclass
class Adapter:
    """What was attached to a model, and what trains beside it.

    Args:
        config: peft's description; `modules_to_save` names what is saved whole beside the matrices.
        origin: how the model under the adapter was made; written beside it, read by `moellava merge-lora`.
        full: what trains in full.
    """

    config: LoraConfig
    origin: dict[str, Any]
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
        in_decoder = ".language_model." in name or ".text_model." in name
        return self.config.bias == "all" and name.endswith(".bias") and in_decoder


def adapt(model: nn.Module, model_args: ModelArguments, moe_args: MoEArguments, args: TrainingArguments) -> Adapter:
    """Attaches the adapters that the flags ask for, over quantised linears with --bits 4 or 8.

    Args:
        model: assembled, the native engine's.

    Raises:
        UserError: nothing to adapt, or flags that do not go together.
    """
    targets = wanted_targets(model, model_args, moe_args, args)
    quantised: dict[str, Any] = {"bits": args.bits, "quant_type": args.quant_type, "double_quant": args.double_quant}
    origin = {
        "base": model_args.model_name_or_path,
        "dtype": str(model.dtype).removeprefix("torch."),
        "moe": getattr(model.config, "moe", None),
        "quantised": quantised,
    }
    if args.bits < 16:
        if zero_stage(args.deepspeed) == 3:
            raise UserError(
                f"--bits {args.bits} and --deepspeed {args.deepspeed} (ZeRO-3) conflict: packed weights cannot be "
                "split by it. Use ZeRO-2 (scripts/zero2.json); the quantised weights are small."
            )
        from moellava.adapters.quantize import quantise

        quantise(model, target_names(model, only_experts=False), args.device, **quantised)
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        bias=args.lora_bias,
        target_modules=pattern_of(targets, (name for name, _ in model.named_modules())),
        base_model_name_or_path=model_args.model_name_or_path,
    )
    attach(model, config, targets)
    full = trained_in_full(model, model_args, moe_args, args.lora_enable)
    # Routers are saved whether they train or not: a frozen one's balancing bias moves all the same.
    routers = [part for _, layer in moe_layers(model) for part in router_modules(layer)]
    config.modules_to_save = sorted({*names_of(model, routers), *covering(model, full)})
    return Adapter(config, origin, full)


def trained_in_full(
    model: nn.Module, model_args: ModelArguments, moe_args: MoEArguments, lora_enable: bool
) -> list[nn.Parameter]:
    """What trains in full beside adapters: what the stage trains without them, less the parts that are adapted.

    Args:
        lora_enable: whether the decoder has adapters; else those of the vision encoder are the only ones.
    """
    if moe_args.moe_enable:
        return beside_experts(model, model_args, moe_args)
    rests = model_args.freeze_backbone or lora_enable
    return list(FINETUNE.selects(model, replace(model_args, freeze_backbone=rests), moe_args))


def covering(model: nn.Module, parameters: Iterable[nn.Parameter]) -> list[str]:
    """Names of the largest modules, and of single parameters, that hold the given parameters and no others."""
    wanted = {id(parameter) for parameter in parameters}

    def walk(module: nn.Module, prefix: str) -> Iterator[str]:
        below = list(module.parameters())
        if below and all(id(parameter) in wanted for parameter in below):
            yield prefix.removesuffix(".")
            return
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in wanted:
                yield prefix + name
        for name, child in module.named_children():
            yield from walk(child, f"{prefix}{name}.")

    return list(walk(model, ""))


def wanted_targets(
    model: nn.Module, model_args: ModelArguments, moe_args: MoEArguments, args: TrainingArguments
) -> list[str]:
    """Names of the linears that the flags want adapted. Raises UserError where a flag finds none."""
    asked = {}
    if args.lora_enable:
        asked["--lora_enable True"] = target_names(model, only_experts=moe_args.moe_enable and args.only_lora_ffn)
    if model_args.use_vision_lora:
        asked["--use_vision_lora True"] = vision_target_names(model)
    for flag, found in asked.items():
        if not found:
            where = "vision encoder" if "vision" in flag else "language model"
            raise UserError(f"{flag}: the {where} of this {type(model).__name__} has no linear layer for an adapter.")
    return [name for found in asked.values() for name in found]


def target_names(model: nn.Module, only_experts: bool) -> list[str]:
    """Names of the linears that get an adapter.

    Args:
        model: a composed model; a sparse one with the native engine.
        only_experts: those of the MoE layers (experts and shared MLPs) and no others. Routers never.
    """
    sparse = [layer for _, layer in moe_layers(model)]
    routing = {id(module) for layer in sparse for part in router_modules(layer) for module in part.modules()}
    linears = linears_in(sparse if only_experts else [parts_of(model)["language_model"]])
    return names_of(model, [linear for linear in linears if id(linear) not in routing])


def vision_target_names(model: nn.Module) -> list[str]:
    """Names of the vision encoder's linears that get an adapter: those of the layers whose output is read."""
    return names_of(model, linears_in(read_layers(model, parts_of(model)["vision_tower"])))


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


def trainable_parameters(model: nn.Module, adapter: Adapter) -> list[nn.Parameter]:
    """What trains: adapters, the biases that --lora_bias names, and what trains in full."""
    chosen = lora_parameters(model) + adapter.full
    if adapter.config.bias == "lora_only":
        chosen += [layer.base_layer.bias for _, layer in lora_layers(model) if layer.base_layer.bias is not None]
    elif adapter.config.bias == "all":
        decoder = parts_of(model)["language_model"]
        chosen += [parameter for name, parameter in decoder.named_parameters() if name.endswith("bias")]
    return chosen
