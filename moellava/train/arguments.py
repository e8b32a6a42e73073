# SPDX-License-Identifier: Apache-2.0
"""The flags of ours: dataclasses, what some of them mean in terms of others, and spellings of before.

A flag that is accepted does something. What cannot be served is refused by name (`conflicts.py`),
before anything loads. Nothing here waits for torch: `parsing.py` joins Hugging Face's own flags, and reads all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from moellava.data.images import USUAL_LIMITS, Limits
from moellava.data.media import NUM_FRAMES
from moellava.errors import UserError
from moellava.eval.layout import DATA_FOLDER as TASK_FOLDER
from moellava.moe.spec import PRESETS, MoESpec, MoESpecFlags, given_options
from moellava.startup import lazily

if TYPE_CHECKING:
    from moellava.train.parsing import (
        ARGUMENT_CLASSES,
        TrainingArguments,
        given_flags,
        make_parser,
        parse_arguments,
    )

__all__ = ["ARGUMENT_CLASSES", "TrainingArguments", "given_flags", "make_parser", "parse_arguments"]

lazily(__name__)


def _flag(help_text: str, default=None, **kwargs):
    """A dataclass field whose text is shown by `train.py --help`."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help_text, **kwargs})
    return field(default=default, metadata={"help": help_text, **kwargs})


@dataclass
class ReleasedArguments:
    """A released vision-language model in place of --model_name_or_path, and what goes by the names of its guides."""

    model_id: str | None = _flag("A released model; `moellava models` lists them.")
    model_local_path: str | None = _flag("Folder of a released model; with --model_id, where that model lies.")
    trust_remote_code: bool = _flag("Run the Python code in the model's folder, for architectures that need it.", False)
    train_vision_encoder: bool = _flag("Train the vision encoder, in full.", False)
    train_vision_projector: bool | None = _flag(
        "Train what maps image features to embeddings. Unset: not with a released model."
    )
    use_vision_lora: bool = _flag("Train low-rank adapters beside the vision encoder's frozen linears.", False)
    use_lora: bool = _flag("The same as --lora_enable.", False)
    q_lora: bool = _flag("The same as --lora_enable True --bits 4.", False)
    mask_question_tokens: bool = _flag("False: train on every token but padding and media.", True)
    user_key: str = _flag("What the records call the user's turns.", "human")
    assistant_key: str = _flag("What the records call the model's turns.", "gpt")

    @property
    def is_released(self) -> bool:
        """Whether a released model is asked for."""
        return bool(self.model_id or self.model_local_path)


@dataclass
class ModelArguments(ReleasedArguments):
    """What is composed or loaded, and which part of it trains."""

    model_name_or_path: str = _flag("Folder or hub id: a language model, or any folder that a stage has left.", "")
    version: str | None = _flag(
        "Conversation template: plain for stage 1; v1, qwen, phi, stablelm … after it. Unset: the folder's own, or, "
        "where it has none or stage 1's, the one that goes with the language model."
    )
    plugin: list[str] | None = _flag(
        "Python files that register templates, tokenizers, families, projectors or architectures (docs/PLUGINS.md).",
        None,
        nargs="+",
    )
    force_version: bool = _flag("Take --version although it does not fit the tokenizer or the stage.", False)
    image_tower: list[str] | None = _flag(
        "Folder or hub id of a vision model; with a language model only. Of two, the features are joined by patches."
    )
    image_projector_type: str | None = _flag(
        "Name of the projector; docs/CUSTOM.md lists them. Unset: the folder's, or linear."
    )
    mm_vision_select_layer: int | None = _flag(
        "Hidden state of the tower that is read: -1 is the last, -2 the one before. Unset: the folder's, or -1."
    )
    mm_vision_select_feature: str | None = _flag(
        "patch (without class and register tokens), cls_patch or full. Unset: the folder's, or patch."
    )
    mm_use_im_start_end: bool | None = _flag(
        "Enclose each image in <im_start> and <im_end>, two trained tokens. Unset: as the folder does, or not."
    )
    pretrain_mm_mlp_adapter: str | None = _flag("Projector to start from: a stage's folder or an mm_projector.bin.")
    untrained_projector: bool = _flag("Begin stage 2 with a projector that no stage 1 has trained.", False)
    tune_mm_mlp_adapter: bool = _flag("Stage 1: train the projector and nothing else.", False)
    freeze_mm_mlp_adapter: bool = _flag("Keep the projector as it is in stages 2 and 3.", False)
    freeze_backbone: bool = _flag("Keep the language model as it is in stage 2.", False)
    cache_dir: str | None = _flag("Where hub downloads are kept.")
    attn_implementation: str | None = _flag("eager, sdpa or flash_attention_2; unset: what transformers chooses.")


@dataclass
class DataArguments:
    """Which records are read and what happens to bad ones."""

    data_path: list[str] = _flag("Data files of any format (docs/DATA.md); their records are joined.", [])
    eval_data_path: list[str] = _flag("Records for the loss during training (with --eval_strategy).", [])
    image_folder: str | None = _flag("Folder that the records' image paths are relative to.")
    video_folder: str | None = _flag("Folder that the records' video paths are relative to; unset: --image_folder.")
    confine_media: bool = _flag("Refuse paths that lead out of --image_folder or --video_folder, also by links.", False)
    num_frames: int = _flag("Frames that stand for a video, evenly spread over it.", NUM_FRAMES)
    image_aspect_ratio: str | None = _flag(
        "square (as the tower's processor does), pad (to a square, mean colour), native (as it is, for Pixtral), "
        "anyres (tiles, as LLaVA-1.6) or anyres_max_N (tiles of at most N squares' tokens, as LLaVA-OneVision). "
        "Unset: the folder's, or square."
    )
    image_grid_pinpoints: str | None = _flag(
        "Grids of tiles for anyres: '[(336, 672), …]', width and height in pixels, or '(1x1),...,(3x3)' squares of the "
        "tower. Unset: the folder's, or those of LLaVA-1.6 or LLaVA-OneVision."
    )
    is_multimodal: bool = _flag("False refuses records with images or videos: a text-only run.", True)
    lazy_preprocess: bool = _flag("Tokenize when a record is first needed; False tokenizes all before step 0.", True)
    overlong: str = _flag(
        "Record longer than --model_max_length tokens: error, drop (counted) or truncate.", "truncate"
    )
    bad_files: str = _flag("Missing, damaged or oversized image or video: error, or skip (counted).", "error")
    max_image_pixels: int = _flag("Width × height of the largest image, or frame of a video.", USUAL_LIMITS.pixels)
    max_image_side: int = _flag("Longest side of an image or frame, in pixels.", USUAL_LIMITS.side)
    max_aspect_ratio: float = _flag("Longer side of an image or frame by its shorter one.", USUAL_LIMITS.aspect_ratio)
    cache_features: str | None = _flag(
        "Folder where features of pictures are kept: a frozen tower sees each picture once, for all runs."
    )
    cache_pixels: str | None = _flag(
        "Folder where pixels of pictures are kept: each is decoded once, for all runs, also where the tower trains."
    )
    skip_list: str | None = _flag("Records to leave out (counted): a file of `moellava check-data --skip-list`.")

    def __post_init__(self):
        self.limits()

    def limits(self) -> Limits:
        """How large an image may be. Raises UserError for values out of range."""
        return Limits(self.max_image_pixels, self.max_image_side, self.max_aspect_ratio)


@dataclass
class MoEArguments(MoESpecFlags):
    """What becomes a Mixture of Experts. One flag for each option of `MoESpec`, None until it is given, and these."""

    moe_enable: bool = _flag("Stage 3: replace dense MLPs by MoE layers; experts and routers train.", False)
    moe_preset: str | None = _flag("'moe-llava' restores the original's routing and loss (docs/MOE.md).")
    ep_size: int = _flag(
        "Processes that share one set of experts (expert parallelism): upcycled ones with --deepspeed, a language "
        "model's own ones with --fsdp_size.",
        1,
    )
    moe_kernel: str = _flag(
        "Stage 3: what runs the experts: auto, loop, fused, grouped, scattermoe, or a plug-in's.", "auto"
    )
    train_modules: list[str] | None = _flag(
        "Stage 3: module names to train instead of experts and routers; 'wg' stands for the routers."
    )

    def given(self) -> dict[str, Any]:
        """The options that the user gave, by name; a preset gives its own. Raises UserError for values out of range."""
        preset = PRESETS[self.moe_preset] if self.moe_preset else {}
        return {**preset, **given_options(self)}

    def spec(self) -> MoESpec:
        """The options of a dense model that becomes sparse. Raises UserError for values that contradict each other."""
        return MoESpec.from_preset(self.moe_preset or "today", **given_options(self))


@dataclass
class AdapterArguments:
    """LoRA (arXiv:2106.09685) in stages 2 and 3, over weights in 16 or 32, 8 or 4 bits (QLoRA, arXiv:2305.14314)."""

    lora_enable: bool = _flag("Train low-rank adapters beside the language model's frozen linears.", False)
    lora_r: int = _flag("Rank of an adapter.", 128)
    lora_alpha: float = _flag("Scale of an adapter: its output is multiplied by alpha / r.", 256)
    lora_dropout: float = _flag("Fraction of an adapter's input that is dropped in training.", 0.05)
    lora_bias: str = _flag("Biases that train: none, lora_only (adapted linears') or all (the decoder's).", "none")
    only_lora_ffn: bool = _flag(
        "Stage 3: adapters in the MoE layers only; False: in every linear of the decoder.", True
    )
    bits: int = _flag("Bits of the decoder's frozen linears: 16 (as loaded), 8 or 4 (bitsandbytes).", 16)
    double_quant: bool = _flag("--bits 4: quantise the scales as well.", True)
    quant_type: str = _flag("--bits 4: nf4 or fp4.", "nf4")

    def adapter_settings(self) -> dict[str, bool | int | float | str]:
        """The flags of this group by name."""
        return {f.name: getattr(self, f.name) for f in fields(AdapterArguments)}


@dataclass
class RunArguments(AdapterArguments):
    """Flags of the run itself that Hugging Face has not, or has with another default."""

    model_max_length: int = _flag("Longest sample in tokens, image patches counted.", 512)
    group_by_modality_length: bool = _flag("Steps of one modality and similar lengths.", False)
    fsdp_size: int = _flag(
        "Processes that hold one copy of weights, gradients and states together (FSDP2, without DeepSpeed); 1: each "
        "holds all.",
        1,
    )
    packing: bool = _flag(
        "Several samples in a row of --model_max_length, each as if it were alone; a batch is then of rows.", False
    )
    eval_samples: int = _flag("Records of --eval_data_path that are answered, and logged, at each evaluation.", 0)
    report_html: bool = _flag("Write a page and pictures of the run at its end (`moellava report`).", False)
    eval_task: list[str] = _flag("Benchmarks that are scored every --eval_steps, such as easy-vqa.", [])
    eval_task_folder: str = _flag("Where their folders lie (docs/EVAL.md).", TASK_FOLDER)
    eval_task_limit: int | None = _flag("Ask so many of their questions, drawn at random; unset: all.")
    mm_projector_lr: float | None = _flag("Learning rate of the projector; unset: --learning_rate.")
    skip_dry_save: bool = _flag("Do not write and reopen a complete folder before step 0.", False)
    logging_steps: float = _flag("Optimizer steps between two log lines.", 1)
    logging_nan_inf_filter: bool = _flag(
        "HF's filter of losses for the log, for which the host waits after each micro-batch; one that is not finite "
        "stops the run anyway.",
        False,
    )
    save_total_limit: int | None = _flag("Checkpoints kept; older ones go when a newer one is complete.", 1)
    remove_unused_columns: bool = _flag("HF's column filter; our collator keeps what it makes.", False)
    activation_checkpointing: bool = _flag("Compute activations again in the backward: less memory, more time.", False)
    activation_checkpointing_kwargs: dict[str, Any] | str | None = _flag(
        'JSON: the only value is {"use_reentrant": false}.'
    )
    use_cache: bool = _flag("What the saved config says of generation; training itself never caches.", True)
    prediction_loss_only: bool = _flag("Evaluation gives a loss; answers are scored by `moellava eval`.", True)
    average_tokens_across_devices: bool = _flag("Every supervised token weighs the same on every process.", True)


RENAMED_FLAGS = {
    "--evaluation_strategy": "--eval_strategy",
    "--no_cuda": "--use_cpu",
    "--warmup_ratio": "--warmup_steps",
    "--gradient_checkpointing": "--activation_checkpointing",
    "--gradient_checkpointing_kwargs": "--activation_checkpointing_kwargs",
    "--vision_tower": "--image_tower",
    "--mm_projector_type": "--image_projector_type",
}
"""Spellings of older releases, and of LLaVA -> ours. `warmup_steps` below 1 is a ratio in today's transformers."""

DROPPED_FLAGS = {
    "--mm_use_im_patch_token": "the image placeholder needs no token of its own name here",
    "--video_tower": "a video's frames go through --image_tower",
}
"""Flags of the predecessors that would change nothing: accepted when false or unset, refused otherwise."""


def translate_flags(argv: list[str]) -> list[str]:
    """Maps old spellings to today's. Raises UserError for a flag that would silently do nothing."""
    flags: list[str] = []
    skip = False
    for position, word in enumerate(argv):
        if skip:
            skip = False
            continue
        name, has_value, value = word.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
        if name in DROPPED_FLAGS:
            if not has_value and position + 1 < len(argv) and not argv[position + 1].startswith("--"):
                value, skip = argv[position + 1], True
            if value.lower() not in ("false", "none"):
                raise UserError(f"{name} {value}: {DROPPED_FLAGS[name]}. Leave the flag out.")
            continue
        flags.append(RENAMED_FLAGS.get(name, name) + has_value + value)
    return flags


COMPOSED_ONLY = (
    "model_name_or_path",
    "image_tower",
    "pretrain_mm_mlp_adapter",
    "image_projector_type",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_use_im_start_end",
)
"""Flags that say how a model is composed: a released one is as it is."""


def settle(model: ModelArguments, training: Any) -> None:
    """Writes what the flags of `ReleasedArguments` mean into the others, so that the rest of training need not know.

    Raises:
        UserError: flags that contradict each other: a released model beside those that compose another one, or a
            projector that shall both train and rest.
    """
    if model.q_lora:
        training.bits = 4
    training.lora_enable = training.lora_enable or model.use_lora or model.q_lora
    if model.train_vision_projector and model.freeze_mm_mlp_adapter:
        raise UserError("--train_vision_projector True and --freeze_mm_mlp_adapter True conflict: choose one.")
    if model.train_vision_projector is not None:
        model.freeze_mm_mlp_adapter = not model.train_vision_projector
    if model.is_released:
        settle_released(model)


def settle_released(model: ModelArguments) -> None:
    """Puts a released model's folder in the place of --model_name_or_path. Raises UserError: see `settle`."""
    default = {f.name: f.default for f in fields(model)}
    for name in COMPOSED_ONLY:
        if getattr(model, name) != default[name]:
            given = getattr(model, name)
            said = " ".join(given) if isinstance(given, list) else given
            raise UserError(f"--{name} {said} conflicts with --model_id and --model_local_path.")
    if model.tune_mm_mlp_adapter:
        raise UserError(
            "--tune_mm_mlp_adapter True (stage 1) is for composed models. A released model's projector alone trains "
            "with --freeze_backbone True --train_vision_projector True."
        )
    if model.model_local_path:
        model.model_name_or_path = model.model_local_path
    elif model.model_id:
        from moellava.lmm.supported_models import SUPPORTED_MODELS

        model.model_name_or_path = SUPPORTED_MODELS[model.model_id].model_hf_path
    model.freeze_mm_mlp_adapter = not model.train_vision_projector
