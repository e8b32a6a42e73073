# SPDX-License-Identifier: Apache-2.0
"""From flags to the model of a stage: what is composed, what is loaded, and what each stage refuses to start from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moellava.adapters.lora import Adapter
from moellava.data.tokenizer_facts import PLAIN
from moellava.errors import UserError
from moellava.files import model_files
from moellava.lmm.architecture import Architecture, holds_vlm, registered
from moellava.lmm.loaders import find_model
from moellava.log import get_logger
from moellava.model.compose import Composition, describe_parts, version_for
from moellava.model.description import Description
from moellava.model.manifest import TOWER, Manifest, read_folder
from moellava.model.origin import note_data, note_projector
from moellava.model.projector_start import load_projector
from moellava.model.section import plugins_of
from moellava.moe import convert_engine, separate_experts, use_kernel
from moellava.moe.certificate import Certificate, upcycle_certified
from moellava.moe.kernels import require_kernel
from moellava.train.adapt import adapt
from moellava.train.arguments import DataArguments, ModelArguments, MoEArguments, TrainingArguments
from moellava.train.reconcile import own_balance_weight, reconcile, refuse_template, retrain
from moellava.train.stages import FINETUNE, PRETRAIN, Stage
from moellava.vlm import VLM, build, describe

logger = get_logger(__name__)

FLAG = "--model_name_or_path"


@dataclass
class Assembled:
    """What a stage trains.

    Args:
        vlm: ready for the first step, parameters not yet frozen.
        certificate: how far the sparse model is from the dense one; None where nothing was upcycled.
        adapter: what --lora_enable and --use_vision_lora have attached; None without them.
        balance: see `own_balance_weight`.
    """

    vlm: VLM
    certificate: Certificate | None = None
    adapter: Adapter | None = None
    balance: float | None = None


def assemble(
    stage: Stage, model_args: ModelArguments, data_args: DataArguments, moe_args: MoEArguments, args: TrainingArguments
) -> Assembled:
    """Builds or loads the model that a stage starts from.

    Raises:
        UserError: a folder that the stage cannot start from, or flags that do not fit it.
    """
    dtype = training_dtype(args)
    if moe_args.moe_enable:
        require_kernel(moe_args.moe_kernel, args.device, dtype)
    manifest, architecture = start_of(model_args)
    manifest.require_start()
    description = described(manifest, architecture, stage, model_args, data_args, moe_args)
    vlm = build(description, dtype, manifest.called)
    if holds_parts(manifest, architecture):
        refuse_template(vlm, stage, model_args, usual_template(manifest, stage))
    else:
        reconcile(vlm, stage, model_args, data_args)
    note_data(vlm.model.config, data_args.data_path)
    balance = None if moe_args.moe_enable else own_balance_weight(vlm, stage, model_args, moe_args)
    choose_attention(vlm.model, model_args.attn_implementation)
    if model_args.pretrain_mm_mlp_adapter:
        load_projector(vlm.model, model_args.pretrain_mm_mlp_adapter)
        note_projector(vlm.model.config, model_args.pretrain_mm_mlp_adapter)
    certificate = sparsify(vlm, moe_args) if moe_args.moe_enable else None
    # Adapters before the engine, which marks whatever parameters its experts have.
    adapter = adapt(vlm, model_args, moe_args, args) if args.lora_enable or model_args.use_vision_lora else None
    if moe_args.moe_enable and args.deepspeed:
        convert_engine(vlm.model, "deepspeed", ep_size=moe_args.ep_size)
    separate_experts(vlm.model)  # those that are left: a process holds its own alone
    if moe_args.moe_enable:
        kernel = use_kernel(vlm.model, moe_args.moe_kernel, args.device, dtype)
        logger.info("Experts run by --moe_kernel %s: %s", moe_args.moe_kernel, kernel)
    return Assembled(vlm, certificate, adapter, balance)


def described(
    manifest: Manifest,
    architecture: Architecture | None,
    stage: Stage,
    model_args: ModelArguments,
    data_args: DataArguments,
    moe_args: MoEArguments,
) -> Description:
    """What a stage starts from, before any weight is read.

    Args:
        manifest, architecture: of `start_of`.

    Raises:
        UserError: a folder that the stage cannot start from, or flags that do not fit it.
    """
    has_code = (architecture and architecture.remote_code) or plugins_of(manifest.config)
    if model_args.trust_remote_code and not has_code:
        raise UserError(
            f"--trust_remote_code True, but {manifest.called} needs no code of its own, and none would run. Leave the "
            "flag out."
        )
    is_vlm = not holds_parts(manifest, architecture)
    refuse_wrong_start(manifest, is_vlm, stage, model_args, moe_args)
    if moe_args.moe_enable and not manifest.is_sparse:
        moe_args.spec()  # what contradicts itself is told before gigabytes are read
    if not is_vlm:
        return composition(manifest, stage, model_args, data_args)
    description = describe(manifest, model_args.trust_remote_code, architecture)
    if moe_args.moe_enable and description.architecture is not None:
        description.architecture.refuse_upcycling("--moe_enable True")
    return description


def leave_files(model: torch.nn.Module) -> None:
    """Copies parameters that are mapped from a file into memory of their own.

    Processes that train together begin by writing the first one's weights into all others'. In a mapping that takes
    memory of its own all the same, and as long as one frozen tensor of a file is mapped, all of it stays: a second copy
    of the weights.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def holds_parts(manifest: Manifest, architecture: Architecture | None) -> bool:
    """Whether a folder is a part of a vision-language model that is yet to be composed."""
    return architecture is None and not holds_vlm(manifest)


def training_dtype(args: TrainingArguments) -> torch.dtype:
    """What weights are loaded as; those that train get fp32 masters beside it (`masters.py`, or DeepSpeed's)."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def casts_later(args: TrainingArguments, moe_args: MoEArguments) -> bool:
    """Whether weights stay as they are stored until a model is laid out: where it is sharded, or gets fp32 masters.
    DeepSpeed makes its own of 16 bits, quantised weights are of the run's, and upcycling computes with the model."""
    is_ours = not args.deepspeed and args.bits == 16 and not moe_args.moe_enable
    return is_ours and (args.fsdp_size > 1 or training_dtype(args) != torch.float32)


def start_of(model_args: ModelArguments) -> tuple[Manifest, Architecture | None]:
    """The folder that the flags name, and what a registered id, or else the folder, says that it is. Raises UserError:
    see `find_model`."""
    if model_args.is_released:
        return find_model(model_args.model_id, model_args.model_local_path, model_args.trust_remote_code)
    manifest = read_folder(model_args.model_name_or_path, FLAG, patterns=model_files(model_args.trust_remote_code))
    return manifest, registered(manifest)


def choose_attention(model: Any, name: str | None) -> None:
    """Sets what computes attention in all parts. Raises UserError for what is not installed, or does not exist."""
    if name is None:
        return
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        said = str(error).rstrip(".")
        raise UserError(
            f"--attn_implementation {name}: {said}. Leave the flag out, or take sdpa, which needs no package."
        ) from error


def composition(llm: Manifest, stage: Stage, model_args: ModelArguments, data_args: DataArguments) -> Description:
    """A language model and a tower, to be put together."""
    assert model_args.image_tower  # refuse_wrong_start has asked for it
    options = Composition(
        version=model_args.version or usual_template(llm, stage),
        image_projector_type=model_args.image_projector_type or "linear",
        mm_vision_select_layer=-1 if model_args.mm_vision_select_layer is None else model_args.mm_vision_select_layer,
        mm_vision_select_feature=model_args.mm_vision_select_feature or "patch",
        image_aspect_ratio=data_args.image_aspect_ratio or "square",
        image_grid_pinpoints=data_args.image_grid_pinpoints,
        use_im_start_end=bool(model_args.mm_use_im_start_end),
    )
    towers = [read_folder(name, "--image_tower") for name in model_args.image_tower]
    for tower in towers:
        tower.require_start()
    return describe_parts(llm, towers, options)


def usual_template(llm: Manifest, stage: Stage) -> str:
    """The template of a composed model where no flag names one: stage 1's, or that of its language model's family."""
    return PLAIN if stage is PRETRAIN else version_for(llm)


def sparsify(vlm: VLM, moe_args: MoEArguments) -> Certificate | None:
    """Turns a dense model's MLPs into MoE layers of the native engine, or takes a sparse one as it is. Experts that are
    plain copies share memory until `separate_experts`.

    Returns:
        The conversion's certificate; None for a model that was sparse already.
    """
    if vlm.spec is not None:
        retrain(vlm, moe_args)
        return None
    spec = moe_args.spec()
    certificate = upcycle_certified(vlm.model, spec, vlm.probes(), share_copies=True)
    vlm.sparse(spec)
    return certificate


def refuse_wrong_start(
    manifest: Manifest, is_vlm: bool, stage: Stage, model_args: ModelArguments, moe_args: MoEArguments
) -> None:
    """Raises UserError if a stage cannot start from what a folder holds."""
    source, is_llm = manifest.called, not is_vlm
    if manifest.holds == TOWER:
        raise UserError(f"{source} is a vision tower. Give it as --image_tower, beside an LLM.")
    if is_llm and not model_args.image_tower:
        raise UserError(
            f"{source} is a language model without a vision tower: add --image_tower, "
            "or give the folder of an earlier stage."
        )
    if is_llm and moe_args.moe_enable:
        raise UserError(
            f"--moe_enable True (stage 3) starts from a stage-2 folder, but {source} is a language "
            "model whose projector has not been trained. Run stages 1 and 2 first."
        )
    if not is_llm and model_args.image_tower:
        raise UserError(
            f"--image_tower {' '.join(model_args.image_tower)} conflicts with {source}, which has a tower "
            "already. Leave --image_tower out."
        )
    learnt = not is_llm or model_args.pretrain_mm_mlp_adapter
    if not learnt and stage is FINETUNE and not model_args.untrained_projector:
        raise UserError(
            f"Stage 2 from {source}: its projector has learnt nothing. Run stage 1 first (--tune_mm_mlp_adapter True "
            "--version plain), give one as --pretrain_mm_mlp_adapter, or add --untrained_projector True."
        )
    if learnt and model_args.untrained_projector:
        raise UserError("--untrained_projector True, but the projector has been trained. Leave the flag out.")
    if moe_args.moe_enable and manifest.section is not None and manifest.section.stage == PRETRAIN.name:
        raise UserError(
            f"--moe_enable True (stage 3) starts from a stage-2 folder, but {source} is a stage-1 folder, whose "
            "language model has never seen an image. Run stage 2 first."
        )
    if manifest.is_sparse and not moe_args.moe_enable:
        raise UserError(f"{source} is a Mixture of Experts: add --moe_enable True to train it.")
    if manifest.is_sparse and stage is PRETRAIN:
        raise UserError(f"Stage 1 (--tune_mm_mlp_adapter True) needs a dense model, but {source} is a stage-3 folder.")
