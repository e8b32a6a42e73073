# SPDX-License-Identifier: Apache-2.0
"""The model of a run, without its weights: what trains in it is chosen as the stage chooses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from moellava.adapters.lora import target_names, trainable_parameters
from moellava.model.build import on_meta
from moellava.moe import moe_layers, upcycle
from moellava.plan.packed import pack
from moellava.plan.spread import spread
from moellava.train.adapt import adapt
from moellava.train.arguments import DataArguments, ModelArguments, MoEArguments, TrainingArguments
from moellava.train.assemble import choose_attention, described, start_of
from moellava.train.fsdp import spread_experts
from moellava.train.sample_attention import is_flash
from moellava.train.stages import freeze_all_but, stage_of
from moellava.vlm import VLM

WHOLE = 16
"""--bits of weights that are not packed."""

Groups = tuple[ModelArguments, DataArguments, MoEArguments, TrainingArguments]
"""The flags of `train.py`."""


def model_maker(groups: Groups, dtype: torch.dtype) -> tuple[Any, Callable[[int], VLM]]:
    """What flags describe, and what makes its model on the meta device.

    Args:
        groups: flags.
        dtype: that the model computes in.

    Returns:
        description: of the folder, or of the parts.
        make: ep_size -> the model as one process holds it, `requires_grad` set.

    Raises:
        UserError: as training would, for what the stage cannot start from.
    """
    model_args, data_args, moe_args, args = groups
    stage, (manifest, architecture) = stage_of(model_args, moe_args), start_of(model_args)
    description = described(manifest, architecture, stage, model_args, data_args, moe_args)

    def make(ep_size: int) -> VLM:
        model = on_meta(description.config).to(dtype)
        vlm = VLM(model, None, None, description.keywords, description.architecture, manifest.called)
        if not is_flash(model_args.attn_implementation):
            choose_attention(model, model_args.attn_implementation)
        if moe_args.moe_enable and vlm.spec is None:
            spec = moe_args.spec()
            upcycle(model, spec)
            model.config.moe = spec.to_config()
        spread(model, ep_size)
        packed = target_names(vlm, only_experts=False) if args.bits < WHOLE else []
        is_adapted = args.lora_enable or model_args.use_vision_lora
        adapter = adapt(vlm, model_args, moe_args, replace(args, bits=WHOLE)) if is_adapted else None
        pack(model, packed, args.bits, args.double_quant)
        trained = trainable_parameters(vlm, adapter) if adapter else stage.selects(vlm, model_args, moe_args)
        freeze_all_but(model, trained)
        return vlm

    return description, make


def counts_of_experts(make: Callable[[int], VLM]) -> list[int]:
    """Numbers of experts that layers have which may be spread over processes: MoE layers, or a language model's own."""
    vlm = make(1)
    if vlm.spec is not None:
        return sorted({layer.n_experts for _, layer in moe_layers(vlm.model)})
    return sorted({module.num_experts for module in spread_experts(vlm.model)})
