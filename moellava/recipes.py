# SPDX-License-Identifier: Apache-2.0
"""The three stages with the hyper-parameters of LLaVA-1.5 and MoE-LLaVA, for language models that differ in a row.

`moellava recipe` writes one as a run file, and `scripts/v1` starts one, with environment variables in place of what
stands here. Batch sizes are for one of 8 GPUs.

| variable | default | what it is |
|---|---|---|
| MODEL, TOWER | the row's; CLIP ViT-L/14-336 | language model, vision tower: folders or hub ids |
| JSON_FOLDER, DATA | data/json; the stage's | where the data files lie; the files of this stage, separated by spaces |
| IMAGE_FOLDER | data/images | what their image paths are relative to |
| OUTPUT_ROOT, OUTPUT | checkpoints; the stage's | where the stages' folders go; this stage's |
| PRETRAIN_DIR, FINETUNE_DIR | beside it | stage 1's folder, for stage 2; stage 2's, for stage 3 |
| ZERO | zero2 | settings of DeepSpeed: a name, a JSON file, or none |
| PRECISION | bf16 | bf16, fp16 or fp32 |
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moellava.registry import Registry


@dataclass(frozen=True)
class Base:
    """A language model that the recipes start from.

    Args:
        about: what is particular to it.
        name: what its stages' folders begin with.
        model: its id on the hub.
        version: the template of stages 2 and 3.
    """

    about: str
    name: str
    model: str
    version: str = "chat_template"


BASES: Registry[Base] = Registry("recipe")
for _name, _base in {
    "vicuna": Base(
        "Vicuna: a Llama with its SentencePiece tokenizer, which adds <s>.",
        *("llava-vicuna-7b", "lmsys/vicuna-7b-v1.5", "v1"),
    ),
    "qwen": Base(
        "Qwen 1: qwen.tiktoken, no <s>; answers end with <|endoftext|>.",
        *("llava-qwen-1.8b", "Qwen/Qwen-1_8B", "qwen"),
    ),
    "phi2": Base(
        "Phi-2: CodeGen's byte-level BPE; answers end with <|endoftext|>.",
        *("llava-phi-2.7b", "microsoft/phi-2", "phi"),
    ),
    "stablelm": Base(
        "StableLM 2: arcade100k.tiktoken, which takes no new tokens; answers end with <|endoftext|>.",
        *("llava-stablelm-1.6b", "stabilityai/stablelm-2-1_6b", "stablelm"),
    ),
    "openchat": Base(
        "OpenChat 3.5: a Mistral with its SentencePiece tokenizer; turns end with <|end_of_turn|>.",
        *("llava-openchat-7b", "openchat/openchat_3.5", "openchat"),
    ),
    "qwen3": Base(
        "Qwen 3: composed by probes; the template is the one that its tokenizer brings.",
        *("llava-qwen3-0.6b", "Qwen/Qwen3-0.6B"),
    ),
    "llama3": Base(
        "Llama 3.2: a Llama whose byte-level BPE brings its template along.",
        *("llava-llama3.2-1b", "meta-llama/Llama-3.2-1B-Instruct"),
    ),
    "gemma3": Base(
        "Gemma 3, the text models: composed by probes; the template is the one that their tokenizer brings.",
        *("llava-gemma3-270m", "google/gemma-3-270m-it"),
    ),
    "phi4": Base(
        "Phi-4 mini: composed by probes; the template is the one that its tokenizer brings.",
        *("llava-phi4-mini", "microsoft/Phi-4-mini-instruct"),
    ),
    "smollm": Base(
        "SmolLM 2: a Llama whose byte-level BPE brings its template along. SmolLM 3 as well: HuggingFaceTB/SmolLM3-3B.",
        *("llava-smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ),
}.items():
    BASES.register(_name, _base)

STAGES: Registry[str] = Registry("stage")
STAGES.register("pretrain", "stage 1: the projector learns, on captions; nothing else trains")
STAGES.register("finetune", "stage 2: projector and language model learn to follow instructions")
STAGES.register("finetune_moe", "stage 3: MLPs become Mixtures of Experts; experts and routers learn")

FINETUNE_DATA = ("la_tune_256k", "lrv_tune_331k", "lvis_tune_220k_", "svit_tune_157k", "nlp_tune")
MOE_DATA = ("llava_image_tune_", "nlp_tune")
"""LLaVA's and MoE-LLaVA's data files."""


class Variables:
    """Environment variables in place of defaults; one that is empty counts as unset, as `${NAME:-default}` has it."""

    def __init__(self, given: Mapping[str, str]):
        self.given = given

    def __call__(self, name: str, default: Any) -> Any:
        return self.given.get(name) or default

    def files(self, *names: str) -> list[str]:
        """DATA, or files of JSON_FOLDER."""
        folder = self("JSON_FOLDER", "data/json")
        return (self("DATA", "") or " ".join(f"{folder}/{name}.json" for name in names)).split()


def flags_of(base: str, stage: str, variables: Mapping[str, str] = {}) -> dict[str, Any]:
    """The flags of a recipe, by name. Raises UnknownNameError for a language model or a stage that has none."""
    read, entry, _ = Variables(variables), BASES[base], STAGES[stage]
    root, name = read("OUTPUT_ROOT", "checkpoints"), read("NAME", entry.name)
    pretrained = read("PRETRAIN_DIR", f"{root}/{name}-pretrain")
    finetuned = read("FINETUNE_DIR", f"{root}/{name}-finetune")
    model = read("MODEL", entry.model)
    tower = {
        "image_tower": read("TOWER", "openai/clip-vit-large-patch14-336"),
        "image_projector_type": read("PROJECTOR", "mlp2x_gelu"),
        "mm_vision_select_layer": read("SELECT_LAYER", -2),
    }
    if stage == "pretrain":
        return {
            "model_name_or_path": model,
            "version": "plain",
            **tower,
            "tune_mm_mlp_adapter": True,
            **_data(read, ["llava_image_"], "square", read("OUTPUT", pretrained)),
            **_shared(read, batch=32, accumulation=1, rate="1e-3"),
        }
    version = {"version": read("VERSION", entry.version)}
    if stage == "finetune":
        return {
            "model_name_or_path": model,
            **version,
            **tower,
            "pretrain_mm_mlp_adapter": pretrained,
            **_data(read, FINETUNE_DATA, "pad", read("OUTPUT", finetuned)),
            **_shared(read, batch=8, accumulation=2, rate="2e-5"),
        }
    return {
        "model_name_or_path": finetuned,
        **version,
        **_experts(read),
        **_data(read, MOE_DATA, "pad", read("OUTPUT", f"{root}/{name}-moe")),
        **_shared(read, batch=8, accumulation=2, rate="2e-5"),
    }


def _data(read: Variables, names: Any, aspect: str, output: str) -> dict[str, Any]:
    return {
        "data_path": read.files(*names),
        "image_folder": read("IMAGE_FOLDER", "data/images"),
        "image_aspect_ratio": read("ASPECT", aspect),
        "output_dir": output,
    }


def _experts(read: Variables) -> dict[str, Any]:
    capacity = read.given.get("CAPACITY", "1.5")  # CAPACITY= (empty): no token is dropped
    return {
        "moe_enable": True,
        "moe_mode": read("MOE_MODE", "sparse"),
        "num_experts": str(read("NUM_EXPERTS", "4")).split(),
        "top_k_experts": read("TOP_K", 2),
        **({"capacity_factor": capacity} if capacity else {}),
        "use_residual": read("USE_RESIDUAL", False),
        "router_aux_loss_coef": read("AUX_COEF", 0.01),
        "ep_size": read("EP_SIZE", 1),
    }


def _shared(read: Variables, batch: int, accumulation: int, rate: str) -> dict[str, Any]:
    zero, precision = read("ZERO", "zero2"), read("PRECISION", "bf16")
    return {
        **({"deepspeed": zero} if zero != "none" else {}),
        "num_train_epochs": read("EPOCHS", 1),
        "per_device_train_batch_size": read("BATCH", batch),
        "gradient_accumulation_steps": read("ACCUMULATION", accumulation),
        "learning_rate": read("LR", rate),
        "weight_decay": read("WEIGHT_DECAY", 0.0),
        "warmup_ratio": read("WARMUP", 0.03),
        "lr_scheduler_type": read("SCHEDULER", "cosine"),
        "model_max_length": read("MAX_LENGTH", 2048),
        "gradient_checkpointing": read("CHECKPOINTING", True),
        "save_strategy": "steps",
        "save_steps": read("SAVE_STEPS", 1000),
        "save_total_limit": read("SAVE_TOTAL_LIMIT", 1),
        "logging_steps": read("LOGGING_STEPS", 1),
        "dataloader_num_workers": read("WORKERS", 4),
        "report_to": read("REPORT_TO", "tensorboard"),
        "seed": read("SEED", 42),
        **({precision: True} if precision != "fp32" else {}),
    }


def words_of(flags: Mapping[str, Any]) -> list[str]:
    """The same as typed words."""
    return [
        str(word)
        for name, value in flags.items()
        for word in (f"--{name}", *(value if isinstance(value, list) else [value]))
    ]


if __name__ == "__main__":
    import os

    sys.stdout.write("\n".join(words_of(flags_of(sys.argv[1], sys.argv[2], os.environ))) + "\n")
