# SPDX-License-Identifier: Apache-2.0
"""What becomes of each flag of `transformers.TrainingArguments`: it is served, within a range, or refused by name.

Judged by reading transformers' Trainer beside ours: our loss, sampler and folder take the place of much that a flag
there would steer. A flag in neither table comes from a transformers that is newer than the judgement, and is refused
when it is given. A value that says what is done anyway (`--push_to_hub False`) is no reason to stop.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from moellava.moe.flags import Range

COUNT = Range(least=1, most=2**31 - 1)
NATURAL = Range(least=0, most=2**31 - 1)
SEED = Range(least=0, most=2**32 - 1)
"""What NumPy takes."""
STEPS = Range(above=0, most=2**31 - 1)
"""Optimizer steps; below 1: a fraction of the run."""
RATE = Range(above=0, most=1000)

Need = tuple[Callable[[Any], object], str]
"""What has to hold of all flags together for one of them to act, and in words what it needs."""

EVALUATION: Need = (lambda f: f.eval_strategy != "no" or f.eval_on_start, "--eval_strategy steps or epoch")
STEPS_BETWEEN: Need = (lambda f: f.eval_strategy == "steps" or f.eval_task, "--eval_strategy steps, or --eval_task")
EVALUATED: Need = (lambda f: EVALUATION[0](f) or f.eval_task, f"{EVALUATION[1]}, or --eval_task")
EVAL_DATA: Need = (lambda f: f.eval_data_path, "--eval_data_path")
WORKERS: Need = (lambda f: f.dataloader_num_workers > 0, "--dataloader_num_workers above 0")
PROCESSES: Need = (
    lambda f: int(os.environ.get("WORLD_SIZE", "1")) > 1,
    "several processes (`torchrun` or `deepspeed --module moellava.train …`)",
)
DDP: Need = (
    lambda f: PROCESSES[0](f) and not f.deepspeed and f.fsdp_size == 1,
    "several processes without --deepspeed and --fsdp_size (`torchrun -m moellava.train …`)",
)
DENSE_DDP: Need = (
    lambda f: DDP[0](f) and not f.moe_enable,
    "`torchrun -m moellava.train …` without --moe_enable: an expert that no token visits has no gradient",
)
DEEPSPEED: Need = (lambda f: find_spec("deepspeed"), "the package deepspeed: pip install 'moellava[train]'")
ACCELERATOR: Need = (
    lambda f: f.deepspeed or (torch.accelerator.is_available() and not f.use_cpu),
    "a GPU; on the CPU use --bf16 True, or neither",
)
NAMED_TRACKER: Need = (
    lambda f: (
        f.report_to in ("all", "azure_ml", "clearml", "comet_ml", "dagshub", "mlflow", "swanlab", "trackio", "wandb")
    ),
    "--report_to wandb, or another tracker that names runs",
)
TRACKIO: Need = (lambda f: f.report_to in ("all", "trackio"), "--report_to trackio")
PUSH: Need = (lambda f: f.push_to_hub, "--push_to_hub True")
LAUNCHED: Need = (
    lambda f: f.local_rank in (-1, int(os.environ.get("LOCAL_RANK", "0"))),
    "a launcher that sets LOCAL_RANK to the same number; leave it out",
)


@dataclass(frozen=True)
class Served:
    """A flag that acts.

    Attributes:
        within: the numbers that it takes.
        also: a value outside of that range that means 'unset'.
        whole: whether numbers from 1 on have to be whole.
        choices: the words that it takes.
        needs: without which nothing would read it.
        check: value -> what is wrong with it, or None.
    """

    within: Range | None = None
    also: float | None = None
    whole: bool = False
    choices: tuple[str, ...] = ()
    needs: Need | None = None
    check: Callable[[Any], str | None] | None = None

    def problem(self, value: Any, flags: Any) -> str | None:
        """What is wrong with a value, or None."""
        if self.within and value != self.also and value not in self.within:
            also = "" if self.also is None else f", or {self.also} for unset"
            return f"it must be {self.within}{also}."
        if self.whole and value > 1 and value != int(value):
            return "a number above 1 must be whole."
        if self.choices and value not in self.choices:
            return f"choose {', '.join(self.choices)}."
        if self.needs and not self.needs[0](flags):
            return f"needs {self.needs[1]}. Without it nothing reads the flag."
        return self.check(value) if self.check else None


SERVED: dict[str, Served] = {
    "output_dir": Served(),
    # steps and batches
    "per_device_train_batch_size": Served(COUNT),
    "gradient_accumulation_steps": Served(COUNT),
    "num_train_epochs": Served(Range(above=0, most=1e6)),
    "max_steps": Served(COUNT, also=-1),
    "average_tokens_across_devices": Served(),
    "seed": Served(SEED),
    "data_seed": Served(SEED),
    "full_determinism": Served(),
    # optimizer and schedule; `trial.py` builds both before anything loads
    "learning_rate": Served(RATE),
    "lr_scheduler_type": Served(),
    "lr_scheduler_kwargs": Served(),
    "warmup_steps": Served(NATURAL, whole=True),
    "optim": Served(),
    "optim_args": Served(),
    "weight_decay": Served(Range(least=0, most=100)),
    "adam_beta1": Served(Range(least=0, below=1)),
    "adam_beta2": Served(Range(least=0, below=1)),
    "adam_epsilon": Served(Range(least=0, most=1)),
    "max_grad_norm": Served(Range(least=0, most=1e12)),
    "label_smoothing_factor": Served(Range(least=0, below=1)),
    "neftune_noise_alpha": Served(Range(above=0, most=1e6)),
    # precision, speed, memory
    "bf16": Served(),
    "fp16": Served(needs=ACCELERATOR),
    "tf32": Served(),
    "activation_checkpointing": Served(),
    "activation_checkpointing_kwargs": Served(),
    "gradient_checkpointing": Served(),
    "gradient_checkpointing_kwargs": Served(),
    "torch_empty_cache_steps": Served(COUNT),
    "use_cpu": Served(),
    "use_cache": Served(),
    "deepspeed": Served(needs=DEEPSPEED, check=lambda value: deepspeed_problem(value)),
    # log
    "logging_strategy": Served(),
    "logging_steps": Served(STEPS, whole=True),
    "logging_first_step": Served(),
    "log_on_each_node": Served(),
    "logging_nan_inf_filter": Served(),
    "include_num_input_tokens_seen": Served(),
    "log_level": Served(),
    "log_level_replica": Served(),
    "disable_tqdm": Served(),
    "skip_memory_metrics": Served(),
    "report_to": Served(),
    "run_name": Served(needs=NAMED_TRACKER),
    "project": Served(needs=TRACKIO),
    "trackio_space_id": Served(needs=TRACKIO),
    "trackio_bucket_id": Served(needs=TRACKIO),
    "trackio_static_space_id": Served(needs=TRACKIO),
    # evaluation
    "eval_strategy": Served(),
    "eval_steps": Served(STEPS, whole=True, needs=STEPS_BETWEEN),
    "eval_delay": Served(NATURAL, needs=EVALUATION),
    "per_device_eval_batch_size": Served(COUNT, needs=EVALUATED),
    "eval_on_start": Served(needs=EVAL_DATA),
    # saving and going on
    "save_strategy": Served(),
    "save_steps": Served(STEPS, whole=True),
    "save_total_limit": Served(COUNT),
    "resume_from_checkpoint": Served(),
    # the complete folder on the hub; see `hub.py`
    "push_to_hub": Served(),
    "hub_model_id": Served(needs=PUSH),
    "hub_token": Served(needs=PUSH),
    "hub_private_repo": Served(needs=PUSH),
    "hub_revision": Served(needs=PUSH),
    "hub_strategy": Served(needs=PUSH),
    # loading of data
    "dataloader_num_workers": Served(Range(least=0, most=1024)),
    "dataloader_drop_last": Served(),
    "dataloader_pin_memory": Served(),
    "dataloader_persistent_workers": Served(needs=WORKERS),
    "dataloader_prefetch_factor": Served(Range(least=1, most=1024), needs=WORKERS),
    "dataloader_multiprocessing_context": Served(choices=("fork", "forkserver", "spawn"), needs=WORKERS),
    # several processes
    "ddp_find_unused_parameters": Served(needs=DENSE_DDP),
    "ddp_bucket_cap_mb": Served(COUNT, needs=DDP),
    "ddp_broadcast_buffers": Served(needs=DDP),
    "ddp_static_graph": Served(needs=DENSE_DDP),
    "ddp_backend": Served(choices=("nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl", "xccl"), needs=DDP),
    "ddp_timeout": Served(Range(least=1, most=10**8), needs=PROCESSES),
    "local_rank": Served(needs=LAUNCHED),
}
"""Flags that act. See `tests/train/test_flag_ledger.py`, which shows that each of them does."""

OWN_RANGES: dict[str, Served] = {
    "model_max_length": Served(COUNT),
    "mm_projector_lr": Served(RATE),
    "ep_size": Served(COUNT),
    "fsdp_size": Served(COUNT),
}
"""Ranges of our own numbers that no dataclass of options checks."""


@dataclass(frozen=True)
class Refused:
    """A flag that would change nothing, or something for the worse.

    Attributes:
        reason: why, and what to do instead.
        same: values that say what is done anyway, so that they may be given; empty: the default.
    """

    reason: str
    same: tuple[Any, ...] = ()


_BEST = Refused(
    "is not served: the last folder is what the next stage takes. Evaluate checkpoints with `moellava eval` "
    "(--save_strategy steps, --save_total_limit N) and pass the best one on."
)
_METRICS = Refused(
    "is not served: evaluation during training gives a loss, and nothing reads the flag. `moellava eval` scores "
    "answers."
)
_COMPILE = Refused(
    "is not served: lengths, images and supervised positions change with each batch, and the model is compiled again "
    "and again: 10 to 13 graphs in 8 steps, which took 30 times as long, for the same losses. Leave the flag out."
)
_LIGER = Refused(
    "is not served: it replaces the forward of each layer's MLP, which an MoE layer has not the parts of, and that of "
    "the model, for a loss that needs no full logits; here none needs them. Leave the flag out."
)
_FSDP = Refused(
    "is not served: it shards nothing on the CPU, and knows no experts. Parameters are split with --fsdp_size N, or "
    "with --deepspeed zero3."
)
_CHECKPOINTS = (
    "is not served: checkpoints hold optimizer states, and stay here. The complete folder is uploaded: --hub_strategy "
    "end, which is also what happens without the flag."
)
_ORDER = Refused("is not served: our sampler deals the samples. --group_by_modality_length True groups by length.")
_EVAL_PRECISION = Refused(
    "is not served: evaluation happens in the middle of training and keeps its precision: --bf16 or --fp16."
)
_RESUME = Refused("is not served: a run goes on with the same samples in the same order. Leave the flag out.")

REFUSED: dict[str, Refused] = {
    "hub_always_push": Refused("is not served: a run uploads once, when its folder is complete."),
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "prediction_loss_only": _METRICS,
    "eval_do_concat_batches": _METRICS,
    "eval_use_gather_object": _METRICS,
    "eval_accumulation_steps": _METRICS,
    "include_for_metrics": _METRICS,
    "batch_eval_metrics": _METRICS,
    "label_names": _METRICS,
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "fsdp": _FSDP,
    "fsdp_config": _FSDP,
    "parallelism_config": _FSDP,
    "accelerator_config": _ORDER,
    "train_sampling_strategy": _ORDER,
    "length_column_name": _ORDER,
    "bf16_full_eval": _EVAL_PRECISION,
    "fp16_full_eval": _EVAL_PRECISION,
    "ignore_data_skip": _RESUME,
    "save_only_model": Refused(
        "is not served: a killed run could not go on from such a checkpoint. --save_total_limit bounds the room, and "
        "the stage's own folder holds the model alone."
    ),
    "restore_callback_states_from_checkpoint": _RESUME,
    "dataloader_in_order": _RESUME,
    "remove_unused_columns": Refused("is not served: our collator makes what the model reads, and nothing else."),
    "auto_find_batch_size": Refused(
        "is not served: a batch that shrinks on the way changes the run. Choose --per_device_train_batch_size, and "
        "--gradient_accumulation_steps for the rest."
    ),
    "optim_target_modules": Refused(
        "is read by GaLore and APOLLO alone, which would regroup the parameters; neither is served. Adapters save "
        "memory: --lora_enable True."
    ),
    "enable_jit_checkpoint": Refused(
        "is not served: it would save in the middle of a step. Save more often: --save_steps."
    ),
    "save_on_each_node": Refused("is not served: all nodes share one --output_dir."),
    "debug": Refused("is not served: it prints, and ends in a traceback. Leave the flag out."),
    "do_train": Refused("False is not served: `moellava train` trains. `moellava eval` evaluates.", same=(True,)),
    "do_eval": Refused("is not served: evaluation is asked for with --eval_strategy."),
    "do_predict": Refused("is not served: `moellava eval` answers."),
}
"""Flags that are refused, unless their value says what is done anyway."""

REFUSED_VALUES: dict[tuple[str, str], str] = {
    ("lr_scheduler_type", "reduce_lr_on_plateau"): "is not served: its rate follows evaluations. Choose cosine.",
    ("lr_scheduler_type", "greedy"): "is not served: its rate follows evaluations. Choose cosine.",
    ("save_strategy", "best"): _BEST.reason,
    **{("hub_strategy", name): _CHECKPOINTS for name in ("every_save", "checkpoint", "all_checkpoints")},
    ("output_dir", ""): "names no folder.",
}
"""Values of served flags that are refused."""

SECRETS = ("hub_token",)
"""Flags whose values nobody is shown, and no file keeps."""

_LARGEST = 2**63 - 1


def word(value: Any) -> str:
    """A value as it is typed."""
    return str(getattr(value, "value", value))


def typed(name: str, value: Any) -> str:
    """A flag as it is typed, for messages."""
    return f"--{name} {'…' if name in SECRETS else word(value)}"


def hf_names() -> list[str]:
    """Names of all flags of the installed transformers."""
    return [item.name for item in fields(transformers.TrainingArguments)]


def find_problems(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """A line for each flag on the command line that is refused, or whose value is out of range.

    Args:
        given: values by name, of the flags that stand there.
        defaults: values by name, of all flags, ours and transformers'.
    """
    flags, judged = SimpleNamespace(**{**defaults, **given}), {*hf_names(), *OWN_RANGES}
    found = []
    for name, value in given.items():
        problem = None if _is_sound(value) else "it must be a finite number of at most 64 bits."
        if problem is None and name in judged:
            problem = _judge(name, value, defaults[name], flags)
        if problem:
            found.append(f"{typed(name, value)}: {problem}")
    return found


def _judge(name: str, value: Any, default: Any, flags: Any) -> str | None:
    """What is wrong with a flag of transformers, or with one of `OWN_RANGES`."""
    if name in REFUSED:
        refused = REFUSED[name]
        return None if value in (refused.same or (default,)) else refused.reason
    if (name, word(value)) in REFUSED_VALUES:
        return REFUSED_VALUES[name, word(value)]
    served = SERVED.get(name) or OWN_RANGES.get(name)
    if served is None:
        return "this flag of transformers is newer than this package and has not been judged. Leave it out."
    return served.problem(value, flags)


def _is_sound(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return all(
        not isinstance(number, (int, float)) or (math.isfinite(number) and abs(number) <= _LARGEST)
        for number in numbers
    )


AUTO_EP = (
    "its part expert_parallel (DeepSpeed's AutoEP) is not served: no folder could be written of the experts that it "
    "deals out (docs/SCALE.md). Take it out: --fsdp_size N --ep_size M spread a language model's own experts."
)


def deepspeed_problem(value: str) -> str | None:
    """What is wrong with a DeepSpeed configuration, a path or JSON itself, or None."""
    try:
        text = value if value.startswith("{") else Path(value).read_text(encoding="utf-8")
        read = json.loads(text)
    except (OSError, ValueError) as error:
        return f"{' '.join(str(error).split())}. It takes zero2 or another name, or a JSON file (docs/TRAIN.md)."
    if not isinstance(read, dict):
        return "it holds no JSON object."
    return AUTO_EP if "expert_parallel" in read else None
