"""From flags to the model of a stage: what is composed, what is loaded, and what each stage refuses to start from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moellava.adapters.lora import Adapter
from moellava.data.tokenizer_facts import PLAIN, fitting_version
from moellava.errors import UserError
from moellava.files import model_files
from moellava.lmm.architecture import Architecture, holds_vlm, registered
from moellava.lmm.loaders import find_model
from moellava.log import get_logger
from moellava.model.compose import Composition, describe_parts, version_for
from moellava.model.families import FAMILIES
from moellava.model.manifest import TOWER, Manifest, read_folder
from moellava.model.projector_start import load_projector
from moellava.moe import convert_engine
from moellava.moe.certificate import Certificate, upcycle_certified
from moellava.train.adapt import adapt
from moellava.train.arguments import DataArguments, ModelArguments, MoEArguments, TrainingArguments
from moellava.train.stages import PRETRAIN, Stage
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
    """

    vlm: VLM
    certificate: Certificate | None = None
    adapter: Adapter | None = None


def assemble(
    stage: Stage, model_args: ModelArguments, data_args: DataArguments, moe_args: MoEArguments, args: TrainingArguments
) -> Assembled:
    """Builds or loads the model that a stage starts from.

    Raises:
        UserError: a folder that the stage cannot start from, or flags that do not fit it.
    """
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    manifest, architecture = start_of(model_args)
    is_vlm = architecture is not None or holds_vlm(manifest)
    refuse_wrong_start(manifest, is_vlm, stage, model_args, moe_args)
    if is_vlm:
        description = describe(manifest, model_args.trust_remote_code, architecture)
        if moe_args.moe_enable and description.architecture is not None:
            description.architecture.refuse_upcycling("--moe_enable True")
        vlm = build(description, dtype, manifest.called)
        settle(vlm, stage, model_args, data_args)
    else:
        vlm = composed(manifest, stage, model_args, data_args, dtype)
    choose_attention(vlm.model, model_args.attn_implementation)
    if model_args.pretrain_mm_mlp_adapter:
        load_projector(vlm.model, vlm.parts["projector"][0], model_args.pretrain_mm_mlp_adapter)
    certificate = sparsify(vlm, moe_args) if moe_args.moe_enable else None
    # Adapters before the engine, which marks whatever parameters its experts have.
    adapter = adapt(vlm, model_args, moe_args, args) if args.lora_enable or model_args.use_vision_lora else None
    if moe_args.moe_enable and args.deepspeed:
        convert_engine(vlm.model, "deepspeed", ep_size=moe_args.ep_size)
    return Assembled(vlm, certificate, adapter)


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
        raise UserError(f"--attn_implementation {name}: {error}") from error


def composed(
    llm: Manifest, stage: Stage, model_args: ModelArguments, data_args: DataArguments, dtype: torch.dtype
) -> VLM:
    """A language model and a tower, put together."""
    assert model_args.image_tower is not None  # refuse_wrong_start has asked for it
    options = Composition(
        version=model_args.version or (PLAIN if stage is PRETRAIN else version_for(llm)),
        image_projector_type=model_args.image_projector_type,
        mm_vision_select_layer=model_args.mm_vision_select_layer,
        mm_vision_select_feature=model_args.mm_vision_select_feature,
        image_aspect_ratio=data_args.image_aspect_ratio or "square",
        use_im_start_end=bool(model_args.mm_use_im_start_end),
    )
    tower = read_folder(model_args.image_tower, "--image_tower")
    return build(describe_parts(llm, tower, options), dtype, llm.called)


def settle(vlm: VLM, stage: Stage, model_args: ModelArguments, data_args: DataArguments) -> None:
    """Gives a model the template and the image shape that the flags name, or leaves its own."""
    vlm.require_tokenizer()
    enclosed = vlm.section.use_im_start_end
    if model_args.mm_use_im_start_end not in (None, enclosed):
        raise UserError(
            f"--mm_use_im_start_end {model_args.mm_use_im_start_end}, but {vlm.source} was trained "
            f"{'with' if enclosed else 'without'} <im_start> and <im_end>. "
            "Leave the flag out: the folder says which it is."
        )
    vlm.settle(model_args.version or next_template(vlm, stage), data_args.image_aspect_ratio)


def next_template(vlm: VLM, stage: Stage) -> str | None:
    """The template in place of stage 1's, which is for captions alone, in the stages after it; None: it may stay."""
    has_template = vlm.architecture is not None or vlm.section.version != PLAIN
    if has_template or stage is PRETRAIN:
        return None
    family = vlm.section.family
    return fitting_version(vlm.tokenizer) if family is None else FAMILIES[family].version


def sparsify(vlm: VLM, moe_args: MoEArguments) -> Certificate | None:
    """Turns a dense model's MLPs into MoE layers of the native engine, or takes a sparse one as it is.

    Returns:
        The conversion's certificate; None for a model that was sparse already.
    """
    spec, stored = moe_args.spec(), vlm.spec
    if stored is None:
        certificate = upcycle_certified(vlm.model, spec, vlm.probes())
        vlm.sparse(spec)
        return certificate
    if moe_args.num_experts is not None and stored.num_experts != spec.num_experts:
        raise UserError(
            f"--num_experts {spec.num_experts}, but the folder's layers have {stored.num_experts}. "
            "Leave the flag out to train the folder's experts further."
        )
    return None


def refuse_wrong_start(
    manifest: Manifest, is_vlm: bool, stage: Stage, model_args: ModelArguments, moe_args: MoEArguments
) -> None:
    """Raises UserError if a stage cannot start from what a folder holds."""
    source, is_llm = manifest.called, not is_vlm
    if manifest.holds == TOWER:
        raise UserError(f"{source} is a vision tower. Give it as --image_tower, beside an LLM.")
    if is_llm and model_args.trust_remote_code:
        raise UserError(
            f"--trust_remote_code True, but {source} is a language model, which is composed with no code of its own. "
            "Leave the flag out."
        )
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
            f"--image_tower {model_args.image_tower} conflicts with {source}, which has a tower "
            "already. Leave --image_tower out."
        )
    if manifest.is_sparse and not moe_args.moe_enable:
        raise UserError(f"{source} is a Mixture of Experts: add --moe_enable True to train it.")
    if manifest.is_sparse and stage is PRETRAIN:
        raise UserError(f"Stage 1 (--tune_mm_mlp_adapter True) needs a dense model, but {source} is a stage-3 folder.")
