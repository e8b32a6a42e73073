# SPDX-License-Identifier: Apache-2.0
"""Hostile values of every flag of `train.py`: each is a value that can be read, or a line that names the flag."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from unittest.mock import patch

from moellava.errors import UserError
from moellava.train.arguments import ARGUMENT_CLASSES, RENAMED_FLAGS, parse_arguments
from moellava.train.trial import FAULTS, field_names
from tests.attacks.outcome import Outcome

HOSTILE = ("", "nan", "inf", "-inf", "-1", "0", str(10**30), "1e30", "nonsense", "{", "[]", "/no/such/path")

REFUSALS = [
    ("--learning_rate nan", "finite"),
    ("--learning_rate 0", "above 0"),
    ("--learning_rate -1", "above 0"),
    ("--lora_alpha inf", "finite"),
    ("--router_aux_loss_coef nan", "finite"),
    ("--max_steps 0", "or -1 for unset"),
    ("--num_train_epochs 0", "above 0"),
    ("--per_device_train_batch_size 0", "at least 1"),
    ("--gradient_accumulation_steps -2", "at least 1"),
    ("--logging_steps 0", "above 0"),
    ("--logging_steps 2.5", "whole"),
    ("--save_steps 0", "above 0"),
    ("--save_total_limit -1", "at least 1"),
    ("--save_total_limit 0", "at least 1"),
    ("--warmup_steps -1", "at least 0"),
    ("--weight_decay -0.1", "at least 0"),
    ("--adam_beta1 1", "below 1"),
    ("--max_grad_norm -1", "at least 0"),
    ("--label_smoothing_factor 1", "below 1"),
    ("--seed -1", "at least 0"),
    ("--seed 4294967296", "at most 4294967295"),
    ("--data_seed -1", "at least 0"),
    ("--model_max_length 0", "at least 1"),
    ("--mm_projector_lr 0", "above 0"),
    ("--dataloader_num_workers -1", "at least 0"),
    ("--dataloader_prefetch_factor 2", "--dataloader_num_workers"),
    ("--dataloader_persistent_workers True", "--dataloader_num_workers"),
    ("--dataloader_multiprocessing_context thread --dataloader_num_workers 1", "forkserver"),
    ("--eval_steps 5", "--eval_strategy steps"),
    ("--eval_on_start True", "--eval_data_path"),
    ("--lr_scheduler_type none_such", "--lr_scheduler_type: 'none_such' is unknown"),
    ("--lr_scheduler_type reduce_lr_on_plateau", "cosine"),
    ("--lr_scheduler_type greedy", "cosine"),
    ("--lr_scheduler_type cosine_with_min_lr", "min_lr"),
    ('--lr_scheduler_kwargs {"a":1} --lr_scheduler_type constant', "does not read"),
    ('--lr_scheduler_kwargs {"a":1} --lr_scheduler_type cosine', "unexpected keyword"),
    ("--lr_scheduler_kwargs {", "Expecting"),
    ("--optim none_such", "--optim: 'none_such' is unknown"),
    ("--optim galore_adamw", "by itself"),
    ("--optim grokadamw", "install"),
    ("--optim adamw_torch_xla", "torch_xla"),
    ("--optim_args momentum=0.5", "does not read"),
    ("--optim_args momentum --optim sgd", "--optim_args momentum"),
    ("--optim_args momentum=much --optim sgd", "much"),
    ("--adam_beta1 0.5 --optim sgd", "does not read"),
    ("--save_strategy best", "moellava eval"),
    ("--metric_for_best_model loss", "moellava eval"),
    ("--load_best_model_at_end True", "moellava eval"),
    ("--fsdp full_shard", "--fsdp_size N"),
    ("--hub_always_push True", "once"),
    ("--hub_token x", "--push_to_hub True"),
    ("--hub_strategy checkpoint --push_to_hub True", "--hub_strategy end"),
    ("--report_to none_such", "tensorboard"),
    ("--report_to comet_ml", "comet"),
    ("--deepspeed /no/such.json", "It takes zero2"),
    ("--deepspeed {", "It takes zero2"),
    ('--deepspeed {"expert_parallel":{"enabled":true}}', "--fsdp_size N --ep_size M"),
    ("--train_sampling_strategy sequential", "--group_by_modality_length"),
    ("--accelerator_config {}", "sampler"),
    ("--torch_compile True", "supervised positions"),
    ("--ddp_timeout 5", "several processes"),
    ("--local_rank 3", "launcher"),
    ("--run_name mine", "--report_to"),
    ("--fp16 True --bf16 True", "GPU"),
]
"""Words, and what the refusal says beside the first flag's name. On a machine without a GPU."""

BASE = ["--model_name_or_path", "lm", "--data_path", "a.json", "--output_dir", "out"]
EVERY = 23
"""The share that is quick takes one flag of so many."""


def attacks(everything: bool, folder: Path) -> dict[str, Outcome]:
    """Each flag with each hostile value, in this process; `folder` is not needed."""
    names = sorted(name for group in ARGUMENT_CLASSES for name in field_names(group))
    outcome = Outcome()
    for name in names if everything else names[::EVERY]:
        for value in HOSTILE:
            verdict, failure = try_value(name, value)
            outcome.counts[verdict] += 1
            outcome.failures += failure
    return {"values of flags": outcome}


def try_value(name: str, value: str) -> tuple[str, list[str]]:
    """(what became of a value, the failure if it is one)."""
    shown = RENAMED_FLAGS.get(f"--{name}", name).removeprefix("--")
    try:
        with patch.dict(os.environ):
            parse_arguments([*BASE, f"--{name}", value])
    except UserError as error:
        return "named", [] if shown in str(error) or name in str(error) else [
            f"--{name} {value!r} is not in {str(error)!r}"
        ]
    except FAULTS:
        return "traceback", [f"--{name} {value!r}: {traceback.format_exc()}"]
    return "read", []
