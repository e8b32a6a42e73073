# SPDX-License-Identifier: Apache-2.0
"""What `moellava train --help` prints: our flags in groups, and of Hugging Face's those that a run usually has."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import fields

from moellava.moe.flags import FlagHelp, add_flags, spellings
from moellava.train.arguments import (
    AdapterArguments,
    DataArguments,
    ModelArguments,
    MoEArguments,
    ReleasedArguments,
    RunArguments,
)

USUAL = {
    "output_dir": "The folder that the run leaves. It must be new, or this run's.",
    "deepspeed": "zero1, zero2, zero2_offload or zero3, or a JSON file: how DeepSpeed splits the work (docs/TRAIN.md).",
    "per_device_train_batch_size": "Samples of one process in one pass. Default: 8.",
    "gradient_accumulation_steps": "Passes of one optimizer step. Default: 1.",
    "num_train_epochs": "How often the data are seen. Default: 3.",
    "max_steps": "Stop after so many optimizer steps; above 0 it goes before --num_train_epochs.",
    "learning_rate": "The highest. LLaVA takes 1e-3 in stage 1 and 2e-5 after it. Default: 5e-5.",
    "lr_scheduler_type": "linear, cosine, constant, … Default: linear.",
    "warmup_steps": "Optimizer steps, or below 1 a share of them, in which the rate rises. Default: 0.",
    "weight_decay": "AdamW's. Default: 0.",
    "bf16": "Compute in bfloat16.",
    "fp16": "Compute in float16 (GPUs without bfloat16).",
    "gradient_checkpointing": "Less memory, a quarter more time.",
    "save_strategy": "no, steps or epoch. Default: steps.",
    "save_steps": "Optimizer steps between two checkpoints. Default: 500.",
    "eval_strategy": "no, steps or epoch: a loss on --eval_data_path. Default: no.",
    "eval_steps": "Optimizer steps between two evaluations.",
    "dataloader_num_workers": "Further processes that open images, for each training process. Default: 0.",
    "report_to": "tensorboard, wandb, … or none. Default: none.",
    "seed": "Of everything that is drawn. Default: 42.",
    "resume_from_checkpoint": "A checkpoint of this run. Unset: the newest, if there is one.",
}
"""Flags of Hugging Face that most runs have, in our words; a test holds the defaults against its own."""

GROUPS = (
    ("model", ModelArguments, ReleasedArguments),
    ("data", DataArguments, None),
    ("experts (docs/MOE.md)", MoEArguments, None),
    ("a released model", ReleasedArguments, None),
    ("adapters", AdapterArguments, None),
    ("more about the run", RunArguments, AdapterArguments),
)
"""Title of a group, the dataclass of its flags, and the one whose flags stand elsewhere."""

HIDDEN = {"remove_unused_columns", "prediction_loss_only"}
"""Flags of Hugging Face with a default of ours that no other value goes with: they are refused, and not explained."""

USAGE = "moellava train [run.yaml] [--flag value …]"
DESCRIPTION = """One stage of training, from flags or a file of them to a complete folder (docs/TRAIN.md).
On several GPUs: deepspeed --module moellava.train …, or torchrun -m moellava.train …, with the same flags."""
EPILOG = """--print_config  print what is given, file and flags together, as a run file, and stop
--help_all      this, and every flag of Hugging Face's TrainingArguments that is served
Files of whole runs: `moellava recipe` lists them. Every run leaves its own as run.yaml."""

WIDTH = 120
"""Columns, at most: help in longer lines is hard to read."""


class GroupedHelp(FlagHelp, argparse.RawDescriptionHelpFormatter):
    """A flag's help beside it, our own line breaks, and no second spelling of each flag."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=min(WIDTH, shutil.get_terminal_size().columns))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return action.option_strings[0] if action.option_strings else super()._format_action_invocation(action)


def help_text() -> str:
    """The page of `--help`."""
    parser = argparse.ArgumentParser(
        "moellava train", USAGE, DESCRIPTION, EPILOG, formatter_class=GroupedHelp, add_help=False
    )
    usual = parser.add_argument_group("the run")
    for name, text in USUAL.items():
        usual.add_argument(*spellings(name), help=text)
    for title, group, elsewhere in GROUPS:
        there = {item.name for item in fields(elsewhere)} if elsewhere else set()
        add_flags(parser.add_argument_group(title), group, there | HIDDEN)
    return parser.format_help()


def help_of_all() -> str:
    """The page of `--help_all`."""
    from moellava.train.hf_flags import SERVED
    from moellava.train.parsing import TrainingArguments, make_parser

    own = {item.name for item in fields(RunArguments)}
    names = {item.name for item in fields(TrainingArguments)} & SERVED.keys() - own - USUAL.keys()
    formatter = GroupedHelp("moellava train")
    formatter.start_section("further flags of Hugging Face (docs/TRAIN.md says which are refused, and why)")
    formatter.add_arguments([action for action in make_parser()._actions if action.dest in names])
    formatter.end_section()
    return f"{help_text()}\n{formatter.format_help()}"
