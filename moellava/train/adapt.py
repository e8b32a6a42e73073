# SPDX-License-Identifier: Apache-2.0
"""From flags to adapters: which linears they stand beside, and what trains in full beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peft import LoraConfig
from torch import nn

from moellava.adapters.lora import (
    Adapter,
    attach,
    names_of,
    pattern_of,
    router_modules,
    target_names,
    vision_target_names,
)
from moellava.errors import UserError
from moellava.model.origin import hub_id
from moellava.model.parts import covering
from moellava.model.stored import meant
from moellava.moe import moe_layers
from moellava.train.arguments import ModelArguments, MoEArguments, TrainingArguments
from moellava.train.memory import zero_stage
from moellava.train.stages import FINETUNE, beside_experts
from moellava.vlm import VLM


def adapt(vlm: VLM, model_args: ModelArguments, moe_args: MoEArguments, args: TrainingArguments) -> Adapter:
    """Attaches the adapters that the flags ask for, over quantised linears with --bits 4 or 8.

    Args:
        vlm: assembled, its experts the native engine's.

    Raises:
        UserError: nothing to adapt, or flags that do not go together.
    """
    model, targets = vlm.model, wanted_targets(vlm, model_args, moe_args, args)
    base = hub_id(model_args.model_name_or_path) or model_args.model_name_or_path
    quantised: dict[str, Any] = {"bits": args.bits, "quant_type": args.quant_type, "double_quant": args.double_quant}
    origin = {
        "base": base,
        "dtype": str(meant(next(model.parameters()))).removeprefix("torch."),
        "moe": getattr(model.config, "moe", None),
        "quantised": quantised,
    }
    if args.bits < 16:
        if zero_stage(args.deepspeed) == 3:
            raise UserError(
                f"--bits {args.bits} and --deepspeed {args.deepspeed} (ZeRO-3) conflict: packed weights cannot be "
                "split by it. Use ZeRO-2 (--deepspeed zero2); the quantised weights are small."
            )
        from moellava.adapters.quantize import quantise

        quantise(model, target_names(vlm, only_experts=False), args.device, **quantised)
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        bias=args.lora_bias,
        target_modules=pattern_of(targets, (name for name, _ in model.named_modules())),
        base_model_name_or_path=base,
    )
    attach(model, config, targets)
    full = trained_in_full(vlm, model_args, moe_args, args.lora_enable)
    # Routers are saved whether they train or not: a frozen one's balancing bias moves all the same.
    routers = [part for _, layer in moe_layers(model) for part in router_modules(layer)]
    config.modules_to_save = sorted({*names_of(model, routers), *covering(model, full)})
    return Adapter(config, origin, vlm.keywords, full)


def trained_in_full(
    vlm: VLM, model_args: ModelArguments, moe_args: MoEArguments, lora_enable: bool
) -> list[nn.Parameter]:
    """What trains in full beside adapters: what the stage trains without them, less the parts that are adapted.

    Args:
        lora_enable: whether the decoder has adapters; else those of the vision encoder are the only ones.
    """
    if moe_args.moe_enable:
        return beside_experts(vlm, model_args, moe_args)
    frozen = model_args.freeze_backbone or lora_enable
    return list(FINETUNE.selects(vlm, replace(model_args, freeze_backbone=frozen), moe_args))


def wanted_targets(vlm: VLM, model_args: ModelArguments, moe_args: MoEArguments, args: TrainingArguments) -> list[str]:
    """Names of the linears that the flags want adapted. Raises UserError where a flag finds none."""
    asked = {}
    if args.lora_enable:
        asked["--lora_enable True"] = target_names(vlm, only_experts=moe_args.moe_enable and args.only_lora_ffn)
    if model_args.use_vision_lora:
        asked["--use_vision_lora True"] = vision_target_names(vlm)
    for flag, found in asked.items():
        if not found:
            where = "vision encoder" if "vision" in flag else "language model"
            raise UserError(
                f"{flag}: the {where} of this {type(vlm.model).__name__} has no linear layer for an adapter."
            )
    return [name for found in asked.values() for name in found]
