"""From flags to the model of a stage: what is composed, what is loaded, and what each stage refuses to start from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moellava.adapters.lora import Adapter, adapt
from moellava.errors import UserError
from moellava.lmm.architecture import Architecture
from moellava.lmm.folders import OpenFolder
from moellava.log import get_logger
from moellava.model.builder import folder_kind, load_pretrained_model, load_projector, require_tokenizer
from moellava.model.compose import compose, make_processor
from moellava.model.extended import extend_in_place
from moellava.moe import MoESpec, convert_engine
from moellava.moe.certificate import Certificate, upcycle_certified
from moellava.train.arguments import DataArguments, ModelArguments, MoEArguments, TrainingArguments
from moellava.train.released import open_released
from moellava.train.stages import PRETRAIN, Stage

logger = get_logger(__name__)


@dataclass
class Assembled:
    """What a stage trains.

    Args:
        model, tokenizer, processor: ready for the first step, parameters not yet frozen.
        moe_spec: routing and loss weights; None for a dense model.
        certificate: how far the sparse model is from the dense one; None where nothing was upcycled.
        adapter: what --lora_enable and --use_vision_lora have attached; None without them.
        family: of a released model; None for a composed one.
    """

    model: nn.Module
    tokenizer: Any
    processor: Any
    moe_spec: MoESpec | None
    certificate: Certificate | None = None
    adapter: Adapter | None = None
    family: Architecture | None = None


def assemble(
    stage: Stage, model_args: ModelArguments, data_args: DataArguments, moe_args: MoEArguments, args: TrainingArguments
) -> Assembled:
    """Builds or loads the model that a stage starts from.

    Raises:
        UserError: a folder of the wrong kind, or flags that do not fit it.
    """
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    family = None
    if model_args.is_released:
        released, kind = open_released(model_args, moe_args, dtype)
        model, tokenizer, processor, family = released.model, released.tokenizer, released.processor, released.family
    else:
        kind = folder_kind(model_args.model_name_or_path)
        refuse_wrong_kind(kind, stage, model_args, moe_args)
        start = compose_parts if kind == "llm" else reopen
        model, tokenizer, processor = start(model_args, data_args, dtype)
    choose_attention(model, model_args.attn_implementation)
    if model_args.pretrain_mm_mlp_adapter:
        load_projector(model, model_args.pretrain_mm_mlp_adapter)
    spec, certificate = None, None
    if moe_args.moe_enable:
        probes = OpenFolder(model, tokenizer, processor, family).probes()
        spec, certificate = sparsify(model, kind, moe_args, probes)
    # Adapters before the engine, which marks whatever parameters its experts have.
    adapter = adapt(model, model_args, moe_args, args) if args.lora_enable or model_args.use_vision_lora else None
    if spec and args.deepspeed:
        convert_engine(model, "deepspeed", ep_size=moe_args.ep_size)
    return Assembled(model, tokenizer, processor, spec, certificate, adapter, family)


def choose_attention(model: Any, name: str | None) -> None:
    """Sets what computes attention in all parts. Raises UserError for what is not installed, or does not exist."""
    if name is None:
        return
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise UserError(f"--attn_implementation {name}: {error}") from error


def compose_parts(model_args: ModelArguments, data_args: DataArguments, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """A language model and a tower, put together."""
    assert model_args.image_tower is not None  # refuse_wrong_kind has asked for it
    composed = compose(
        model_args.model_name_or_path,
        model_args.image_tower,
        version=model_args.version,
        image_projector_type=model_args.image_projector_type,
        mm_vision_select_layer=model_args.mm_vision_select_layer,
        mm_vision_select_feature=model_args.mm_vision_select_feature,
        image_aspect_ratio=data_args.image_aspect_ratio or "square",
        use_im_start_end=bool(model_args.mm_use_im_start_end),
        dtype=dtype,
    )
    return composed.model, composed.tokenizer, composed.processor


def reopen(model_args: ModelArguments, data_args: DataArguments, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """A folder of an earlier stage, with the template and the image shape of this one."""
    tokenizer, model, processor, _ = load_pretrained_model(model_args.model_name_or_path, device="cpu", dtype=dtype)
    require_tokenizer(tokenizer, model_args.model_name_or_path, "--model_name_or_path")
    extras = model.config.moellava
    enclosed = bool(extras["use_im_start_end"])
    if model_args.mm_use_im_start_end not in (None, enclosed):
        raise UserError(
            f"--mm_use_im_start_end {model_args.mm_use_im_start_end}, but --model_name_or_path "
            f"{model_args.model_name_or_path} was trained {'with' if enclosed else 'without'} <im_start> and <im_end>. "
            "Leave the flag out: the folder says which it is."
        )
    extras["version"] = model_args.version
    extras["image_aspect_ratio"] = data_args.image_aspect_ratio or extras["image_aspect_ratio"]
    return model, tokenizer, make_processor(processor.image_processor, tokenizer, model.config)


def sparsify(
    model: nn.Module, kind: str, moe_args: MoEArguments, probes: dict[str, Any]
) -> tuple[MoESpec, Certificate | None]:
    """Turns a dense model's MLPs into MoE layers of the native engine, or takes a sparse one as it is.

    Returns:
        The options, and the conversion's certificate (None for a model that was sparse already).
    """
    spec = moe_args.spec()
    if kind == "moe":
        stored = MoESpec.from_config(model.config.moe)
        if moe_args.num_experts is not None and stored.num_experts != spec.num_experts:
            raise UserError(
                f"--num_experts {spec.num_experts}, but the folder's layers have {stored.num_experts}. "
                "Leave the flag out to train the folder's experts further."
            )
        return stored, None
    certificate = upcycle_certified(model, spec, probes)
    model.config.moe = spec.to_config()
    extend_in_place(model)
    return spec, certificate


def refuse_wrong_kind(kind: str, stage: Stage, model_args: ModelArguments, moe_args: MoEArguments) -> None:
    """Raises UserError if a stage cannot start from what --model_name_or_path holds."""
    path = model_args.model_name_or_path
    if kind == "tower":
        raise UserError(f"--model_name_or_path {path} is a vision tower. Give it as --image_tower, beside an LLM.")
    if kind == "llm" and not model_args.image_tower:
        raise UserError(
            f"--model_name_or_path {path} is a language model without a vision tower: add --image_tower, "
            "or give the folder of an earlier stage."
        )
    if kind == "llm" and moe_args.moe_enable:
        raise UserError(
            f"--moe_enable True (stage 3) starts from a stage-2 folder, but --model_name_or_path {path} is a language "
            "model whose projector has not been trained. Run stages 1 and 2 first."
        )
    if kind != "llm" and model_args.image_tower:
        raise UserError(
            f"--image_tower {model_args.image_tower} conflicts with --model_name_or_path {path}, which has a tower "
            "already. Leave --image_tower out."
        )
    if kind == "moe" and not moe_args.moe_enable:
        raise UserError(f"--model_name_or_path {path} is a Mixture of Experts: add --moe_enable True to train it.")
    if kind == "moe" and stage is PRETRAIN:
        raise UserError(f"Stage 1 (--tune_mm_mlp_adapter True) needs a dense model, but {path} is a stage-3 folder.")
