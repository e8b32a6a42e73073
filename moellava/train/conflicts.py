# SPDX-License-Identifier: Apache-2.0
"""Flags of `train.py` that contradict each other: one row each, all reported at once and by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from typing import Any, NamedTuple

from moellava.constants import TILED
from moellava.eval.layout import DATA_FOLDER as TASK_FOLDER
from moellava.eval.suite import BENCHMARKS
from moellava.files import address_problem
from moellava.moe.spec import given_options
from moellava.vis.needed import missing

OWN_BALANCE = "router_aux_loss_coef"
"""The option that a model with experts of its own takes in all stages; `reconcile.py` judges it."""


SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
"""What computes with each process's share alone."""


def holds_copies() -> bool:
    """Whether transformers knows of several copies of a sharded model."""
    from transformers import DistributedConfig

    return "dp_replicate_size" in {item.name for item in fields(DistributedConfig)}


class Flags(NamedTuple):
    """The four groups of flags of `arguments.py`, as rules read them."""

    model: Any
    data: Any
    moe: Any
    training: Any

    @property
    def processes(self) -> int:
        """Of this run, as launchers set it."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def is_fsdp(self) -> bool:
        """Whether the model is sharded without DeepSpeed."""
        return self.training.fsdp_size > 1

    @property
    def in_tiles(self) -> bool:
        """Whether images are to be cut into tiles."""
        return bool(TILED.fullmatch(self.data.image_aspect_ratio or ""))

    @property
    def adapts(self) -> bool:
        """Whether adapters are asked for, in the decoder or in the vision encoder."""
        return self.training.lora_enable or self.model.use_vision_lora

    @property
    def projector_rests(self) -> bool:
        """Whether the flags leave the projector as it is."""
        if self.moe.moe_enable:
            return not self.model.train_vision_projector
        return self.model.freeze_mm_mlp_adapter

    @property
    def all_frozen(self) -> bool:
        """Whether the flags of stages 1 and 2 leave nothing that trains."""
        vision = self.model.train_vision_encoder or self.model.use_vision_lora
        return self.model.freeze_backbone and self.model.freeze_mm_mlp_adapter and not vision


Rule = tuple[Callable[[Flags], object], str]
"""When flags contradict each other, and the message; what stands in braces is read from `Flags`."""

TASK_CONFLICTS: list[Rule] = [
    (
        lambda f: set(f.training.eval_task) - set(BENCHMARKS),
        f"--eval_task {{training.eval_task}}: the known ones are {', '.join(BENCHMARKS)}.",
    ),
    (
        lambda f: f.training.eval_task and not f.training.eval_steps,
        "--eval_task {training.eval_task} needs --eval_steps, the optimizer steps between two scores.",
    ),
    (
        lambda f: not f.training.eval_task and f.training.eval_task_limit is not None,
        "--eval_task_limit {training.eval_task_limit} needs --eval_task.",
    ),
    (
        lambda f: f.training.eval_task_limit is not None and f.training.eval_task_limit < 1,
        "--eval_task_limit {training.eval_task_limit}: at least 1 question.",
    ),
    (
        lambda f: f.training.eval_task_folder != TASK_FOLDER and not set(f.training.eval_task) - {"easy-vqa"},
        "--eval_task_folder {training.eval_task_folder} needs an --eval_task that lies in a folder.",
    ),
]
"""Of benchmarks during training."""

FSDP_CONFLICTS: list[Rule] = [
    (
        lambda f: f.training.fsdp_size < 1 or f.processes % max(f.training.fsdp_size, 1),
        "--fsdp_size {training.fsdp_size}: a number that divides the {processes} processes of this run (`torchrun "
        "--nproc-per-node N -m moellava.train …`).",
    ),
    (
        lambda f: f.is_fsdp and not holds_copies(),
        "--fsdp_size {training.fsdp_size} needs a newer transformers than the one that is installed: 5.23, for Python "
        "3.11 or newer. Here --deepspeed zero3 splits the model.",
    ),
    (
        lambda f: f.is_fsdp and f.training.deepspeed,
        "--fsdp_size {training.fsdp_size} and --deepspeed conflict: both split the model. Choose one.",
    ),
    (
        lambda f: f.is_fsdp and f.moe.moe_enable,
        "--fsdp_size {training.fsdp_size} and --moe_enable True conflict: upcycled experts are spread by DeepSpeed "
        "(--deepspeed zero2 --ep_size N). A folder of `moellava export` has experts of its own and trains with "
        "--fsdp_size and --ep_size, without --moe_enable.",
    ),
    (
        lambda f: f.is_fsdp and f.moe.ep_size > 0 and f.training.fsdp_size % f.moe.ep_size,
        "--ep_size {moe.ep_size} does not divide --fsdp_size {training.fsdp_size}: experts lie on processes that hold "
        "one copy of the model together.",
    ),
    (
        lambda f: f.is_fsdp and f.training.fp16,
        "--fsdp_size {training.fsdp_size} and --fp16 True conflict: its scaled gradients are not split. Use --bf16 "
        "True, or --deepspeed zero3.",
    ),
    (
        lambda f: f.is_fsdp and f.training.bits != 16,
        "--fsdp_size {training.fsdp_size} and --bits {training.bits} conflict: packed weights are not split. Use "
        "--bits 16, or leave --fsdp_size out.",
    ),
    (
        lambda f: f.is_fsdp and f.training.optim not in SHARDED_OPTIMIZERS,
        f"--fsdp_size {{training.fsdp_size}} and --optim {{training.optim.value}} conflict: split weights are trained "
        f"by {', '.join(SHARDED_OPTIMIZERS)}.",
    ),
]
"""Of runs whose model is sharded without DeepSpeed."""

CONFLICTS: list[Rule] = [
    (
        lambda f: not f.model.model_name_or_path,
        "--model_name_or_path is missing: a language model or a stage's folder (or --model_id: a released model).",
    ),
    (lambda f: not f.data.data_path, "--data_path is missing: one or more files of records (docs/DATA.md)."),
    (lambda f: "output_dir" not in f.training.given, "--output_dir is missing: the folder that the run leaves."),
    (
        lambda f: f.model.tune_mm_mlp_adapter and f.model.freeze_mm_mlp_adapter,
        "--tune_mm_mlp_adapter True and --freeze_mm_mlp_adapter True conflict: nothing would train.",
    ),
    (
        lambda f: f.model.tune_mm_mlp_adapter and f.moe.moe_enable,
        "--tune_mm_mlp_adapter True (stage 1) and --moe_enable True (stage 3) conflict: choose one stage.",
    ),
    (
        lambda f: f.model.tune_mm_mlp_adapter and f.model.train_vision_encoder,
        "--tune_mm_mlp_adapter True and --train_vision_encoder True conflict: stage 1 trains the projector alone.",
    ),
    (
        lambda f: f.model.freeze_backbone and f.moe.moe_enable,
        "--freeze_backbone True and --moe_enable True conflict: stage 3 trains the experts of the backbone.",
    ),
    (
        lambda f: f.all_frozen and not f.moe.moe_enable,
        "--freeze_backbone True and --freeze_mm_mlp_adapter True conflict: nothing would train.",
    ),
    (
        lambda f: f.model.image_projector_type == "identity" and f.model.tune_mm_mlp_adapter,
        "--image_projector_type identity and --tune_mm_mlp_adapter True conflict: identity has no parameters.",
    ),
    (
        lambda f: f.moe.train_modules is not None and not f.moe.moe_enable,
        "--train_modules is read in stage 3 only: it needs --moe_enable True.",
    ),
    (
        lambda f: f.moe.moe_kernel != "auto" and not f.moe.moe_enable,
        "--moe_kernel {moe.moe_kernel} runs the experts of stage 3: it needs --moe_enable True.",
    ),
    (
        lambda f: (
            (f.model.attn_implementation or "").startswith("flash_attention")
            and not (f.training.bf16 or f.training.fp16)
        ),
        "--attn_implementation {model.attn_implementation} computes in 16 bits alone: it needs --bf16 True or --fp16 "
        "True. Leave the flag out for fp32.",
    ),
    (
        lambda f: f.moe.ep_size > 1 and not f.training.deepspeed and not f.is_fsdp,
        "--ep_size {moe.ep_size} needs --deepspeed (upcycled experts) or --fsdp_size (a language model's own): the "
        "native engine keeps all experts in each process.",
    ),
    (
        lambda f: f.model.force_version and not f.model.version,
        "--force_version True needs --version: there is no template to force.",
    ),
    (
        lambda f: f.moe.ep_size < 1 or (f.moe.ep_size != 1 and not f.moe.moe_enable and not f.is_fsdp),
        "--ep_size {moe.ep_size}: a number of processes from 1 on, in stage 3 (--moe_enable True), or, for a language "
        "model's own experts, with --fsdp_size in place of --deepspeed.",
    ),
    (
        lambda f: f.training.mm_projector_lr is not None and f.projector_rests,
        "--mm_projector_lr {training.mm_projector_lr}, but the projector does not train. Leave the flag out, or add "
        "--train_vision_projector True.",
    ),
    (
        lambda f: f.moe.moe_enable and f.moe.ep_size > 0 and f.processes % f.moe.ep_size != 0,
        "--ep_size {moe.ep_size} does not divide the {processes} processes of this run.",
    ),
    (
        lambda f: not f.moe.moe_enable and (f.moe.moe_preset or f.moe.given().keys() - {OWN_BALANCE}),
        "MoE flags need --moe_enable True; without it they would do nothing: {sparse}.",
    ),
    (
        lambda f: f.moe.num_experts and (f.moe.top_k_experts or 0) > min(f.moe.num_experts),
        "--top_k_experts {moe.top_k_experts} does not fit --num_experts {moe.num_experts}: a token visits so many.",
    ),
    (
        lambda f: any(count % max(f.moe.ep_size, 1) for count in f.moe.num_experts or []),
        "--ep_size {moe.ep_size} does not divide --num_experts {moe.num_experts}.",
    ),
    (
        lambda f: f.data.overlong not in ("error", "drop", "truncate"),
        "--overlong {data.overlong}: choose error, drop or truncate.",
    ),
    (
        lambda f: f.data.image_aspect_ratio not in (None, "square", "pad", "native") and not f.in_tiles,
        "--image_aspect_ratio {data.image_aspect_ratio}: choose square, pad, native, anyres or anyres_max_N, as "
        "anyres_max_9.",
    ),
    (
        lambda f: f.data.image_grid_pinpoints and f.model.image_tower and not f.in_tiles,
        "--image_grid_pinpoints {data.image_grid_pinpoints} needs --image_aspect_ratio anyres or anyres_max_N.",
    ),
    (
        lambda f: f.data.cache_features and f.model.train_vision_encoder,
        "--cache_features {data.cache_features} and --train_vision_encoder True conflict: features of a tower that "
        "trains change with every step.",
    ),
    (
        lambda f: f.data.cache_features and f.model.use_vision_lora,
        "--cache_features {data.cache_features} and --use_vision_lora True conflict: features of a tower that trains "
        "change with every step.",
    ),
    (
        lambda f: f.data.cache_features and not f.data.is_multimodal,
        "--cache_features {data.cache_features} and --is_multimodal False conflict: there are no pictures.",
    ),
    (
        lambda f: f.data.cache_pixels and not f.data.is_multimodal,
        "--cache_pixels {data.cache_pixels} and --is_multimodal False conflict: there are no pictures.",
    ),
    (
        lambda f: f.data.cache_pixels and f.data.cache_features,
        "--cache_pixels {data.cache_pixels} does nothing beside --cache_features {data.cache_features}, which opens "
        "each picture once by itself. Leave one out.",
    ),
    (lambda f: f.data.num_frames < 1, "--num_frames {data.num_frames}: a video is at least 1 frame."),
    (lambda f: f.data.bad_files not in ("error", "skip"), "--bad_files {data.bad_files}: choose error or skip."),
    (lambda f: f.training.eval_samples < 0, "--eval_samples {training.eval_samples}: a number of records, or 0."),
    (
        lambda f: f.training.eval_samples > 0 and f.training.eval_strategy == "no",
        "--eval_samples {training.eval_samples} needs --eval_strategy steps or epoch, and --eval_data_path.",
    ),
    *TASK_CONFLICTS,
    *FSDP_CONFLICTS,
    (
        lambda f: f.training.report_html and missing(),
        "--report_html True needs matplotlib and pyarrow: pip install 'moellava[vis]', or leave the flag out.",
    ),
    (
        lambda f: f.training.eval_strategy != "no" and not f.data.eval_data_path,
        "--eval_strategy {training.eval_strategy.value} needs --eval_data_path.",
    ),
    (
        lambda f: f.data.eval_data_path and f.training.eval_strategy == "no" and not f.training.eval_on_start,
        "--eval_data_path needs --eval_strategy steps or epoch, or --eval_on_start True: nothing would read it.",
    ),
    (
        lambda f: f.training.activation_checkpointing_kwargs not in (None, {"use_reentrant": False}),
        "--activation_checkpointing_kwargs (--gradient_checkpointing_kwargs) "
        "{training.activation_checkpointing_kwargs}: the non-reentrant one is the only one; the other leaves the "
        "routers without a gradient. Leave the flag out.",
    ),
    (
        lambda f: getattr(f.training, "hf_deepspeed_config", None) and f.training.hf_deepspeed_config.mismatches,
        "--deepspeed {training.deepspeed}: its numbers differ from the flags: "
        "{training.hf_deepspeed_config.mismatches}. Write 'auto' in their place.",
    ),
]
"""Of all runs."""

MATRIX_FLAGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_bias")
"""The adapters' flags that adapters of the vision encoder read as well."""

ADAPTER_CONFLICTS: list[Rule] = [
    (
        lambda f: f.model.tune_mm_mlp_adapter,
        "Adapters and --tune_mm_mlp_adapter True conflict: stage 1 trains the projector alone, in full.",
    ),
    (
        lambda f: f.model.use_vision_lora and f.model.train_vision_encoder,
        "--use_vision_lora True and --train_vision_encoder True conflict: the encoder trains through "
        "adapters, or in full.",
    ),
    (
        lambda f: f.model.use_vision_lora and f.moe.moe_enable and not f.training.lora_enable,
        "--use_vision_lora True and --moe_enable True go together with --lora_enable True only: "
        "experts that train in full would all lie in the adapter's file.",
    ),
    (
        lambda f: f.model.use_vision_lora and f.training.lora_bias == "all",
        "--use_vision_lora True and --lora_bias all conflict: that trains the decoder's biases. Use lora_only.",
    ),
    (
        lambda f: f.training.lora_enable and f.model.freeze_backbone,
        "--lora_enable True and --freeze_backbone True conflict: adapters train beside the backbone's linears.",
    ),
    (
        lambda f: f.training.lora_enable and f.moe.train_modules is not None,
        "--lora_enable True and --train_modules conflict: adapters take their targets from --only_lora_ffn.",
    ),
    (lambda f: f.training.lora_r < 1, "--lora_r {training.lora_r}: the rank is at least 1."),
    (lambda f: f.training.lora_alpha <= 0, "--lora_alpha {training.lora_alpha}: the scale is above 0."),
    (
        lambda f: not 0 <= f.training.lora_dropout < 1,
        "--lora_dropout {training.lora_dropout}: a fraction from 0 to below 1.",
    ),
    (
        lambda f: f.training.lora_bias not in ("none", "lora_only", "all"),
        "--lora_bias {training.lora_bias}: choose none, lora_only or all.",
    ),
    (lambda f: f.training.bits not in (4, 8, 16), "--bits {training.bits}: choose 16, 8 or 4."),
    (
        lambda f: f.training.bits in (4, 8) and find_spec("bitsandbytes") is None,
        "--bits {training.bits} needs the package bitsandbytes: pip install 'moellava[quant]', or use --bits 16.",
    ),
    (lambda f: f.training.quant_type not in ("nf4", "fp4"), "--quant_type {training.quant_type}: choose nf4 or fp4."),
    (
        lambda f: f.training.bits != 4 and (f.training.quant_type != "nf4" or not f.training.double_quant),
        "--quant_type and --double_quant need --bits 4, but --bits is {training.bits}.",
    ),
]
"""Of runs with adapters."""


PLACES = ("output_dir", "cache_dir", "cache_features", "cache_pixels", "video_folder", "eval_task_folder")
"""Flags of files and folders on this machine; a model's say themselves that there is none."""


def find_conflicts(flags: Flags) -> list[str]:
    """Every contradiction between flags, one line each; empty when there is none."""
    rules = CONFLICTS + ADAPTER_CONFLICTS if flags.adapts else CONFLICTS
    preset = {"moe_preset": flags.moe.moe_preset} if flags.moe.moe_preset else {}
    sparse = " ".join(f"--{name} {value}" for name, value in (preset | given_options(flags.moe)).items())
    known = flags._asdict() | {"processes": flags.processes, "sparse": sparse}
    found = [message.format(**known) for broken, message in rules if broken(flags)]
    return found + addresses_given(flags) + idle_adapter_flags(flags)


def addresses_given(flags: Flags) -> list[str]:
    """A line for each address where a place on this machine is meant."""
    given = [(name, getattr(group, name, None)) for group in flags for name in PLACES]
    return [problem for name, value in given if value and (problem := address_problem(value, f"--{name}"))]


def idle_adapter_flags(flags: Flags) -> list[str]:
    """A line about adapter flags that would change nothing, if there are any."""
    default = {field.name: field.default for field in fields(flags.training)}
    given = flags.training.adapter_settings()
    used = set(given) if flags.training.lora_enable else set(MATRIX_FLAGS) if flags.model.use_vision_lora else set()
    idle = [f"--{name} {given[name]}" for name in given if given[name] != default[name] and name not in used]
    return [f"{', '.join(idle)}: needs --lora_enable True; without it nothing would change."] if idle else []
