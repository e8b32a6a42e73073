# SPDX-License-Identifier: Apache-2.0
"""Flags that contradict each other, or that nothing would read: each combination ends in a line that names the flag."""

from __future__ import annotations

import contextlib
import io
import os
import traceback
from pathlib import Path
from unittest.mock import patch

from moellava.cli import main
from moellava.errors import UserError
from moellava.train.arguments import parse_arguments
from moellava.train.trial import FAULTS
from tests.attacks.outcome import Outcome

BASE = "--model_name_or_path lm --data_path a.json --output_dir out"

TRAIN = [
    ("--tune_mm_mlp_adapter True --freeze_mm_mlp_adapter True", "--freeze_mm_mlp_adapter True conflict"),
    ("--tune_mm_mlp_adapter True --moe_enable True", "choose one stage"),
    ("--tune_mm_mlp_adapter True --train_vision_encoder True", "trains the projector alone"),
    ("--freeze_backbone True --moe_enable True", "--freeze_backbone True"),
    ("--freeze_backbone True --freeze_mm_mlp_adapter True", "nothing would train"),
    ("--train_vision_projector True --freeze_mm_mlp_adapter True", "choose one"),
    ("--image_projector_type identity --tune_mm_mlp_adapter True", "no parameters"),
    ("--model_local_path folder", "--model_name_or_path lm conflicts"),
    ("--force_version True", "needs --version"),
    ("--train_modules wg", "needs --moe_enable True"),
    ("--moe_kernel loop", "it needs --moe_enable True"),
    ("--num_experts 4", "--num_experts [4]"),
    ("--moe_preset today", "--moe_preset today"),
    ("--ep_size 2 --moe_enable True", "needs --deepspeed"),
    ("--ep_size -1", "--ep_size -1"),
    ("--ep_size 2 --deepspeed zero2", "with --fsdp_size in place of --deepspeed"),
    ("--fsdp_size 0", "--fsdp_size 0"),
    ("--fsdp_size 2 --moe_enable True", "moellava export"),
    ("--fsdp_size 2 --deepspeed zero2", "both split the model"),
    ("--fsdp_size 2 --ep_size 4", "does not divide --fsdp_size 2"),
    ("--fsdp_size 2 --bits 8 --lora_enable True", "--bits 16"),
    ("--fsdp_size 2 --optim adafactor", "adamw_torch"),
    ("--moe_enable True --num_experts 2 --top_k_experts 3", "--top_k_experts 3"),
    ("--mm_projector_lr 0.1 --freeze_mm_mlp_adapter True", "--mm_projector_lr 0.1"),
    ("--overlong never", "--overlong never"),
    ("--bad_files keep", "--bad_files keep"),
    ("--image_aspect_ratio round", "--image_aspect_ratio round"),
    ("--num_frames 0", "--num_frames 0"),
    ("--eval_samples 2", "--eval_samples 2 needs"),
    ("--eval_task easy-vqa", "--eval_task ['easy-vqa'] needs --eval_steps"),
    ("--eval_task vqa --eval_steps 5", "the known ones are easy-vqa"),
    ("--eval_task_limit 5", "--eval_task_limit 5 needs --eval_task"),
    ("--eval_task easy-vqa --eval_steps 5 --eval_task_limit 0", "--eval_task_limit 0: at least 1"),
    ("--eval_task easy-vqa --eval_steps 5 --eval_task_folder f", "--eval_task_folder f needs"),
    ("--eval_strategy epoch", "--eval_strategy epoch needs --eval_data_path"),
    ("--eval_data_path b.json", "--eval_data_path needs"),
    ("--lora_r 4", "needs --lora_enable True"),
    ("--only_lora_ffn False", "--only_lora_ffn False"),
    ("--lora_enable True --tune_mm_mlp_adapter True", "Adapters and --tune_mm_mlp_adapter"),
    ("--lora_enable True --freeze_backbone True", "--freeze_backbone True"),
    ("--lora_enable True --quant_type fp4", "need --bits 4"),
    ("--lora_enable True --bits 5", "--bits 5"),
    ("--lora_enable True --lora_dropout 1", "--lora_dropout"),
    ("--use_vision_lora True --train_vision_encoder True", "--train_vision_encoder True conflict"),
    ("--use_vision_lora True --lora_bias all", "--lora_bias all"),
    ("--max_image_side 0", "max_image_side"),
    ("--video_tower folder", "--video_tower folder"),
    ("--no_such_flag 1", "--no_such_flag"),
]
"""Flags of `train.py` beside `BASE`, and words of the error."""

COMMANDS = [
    ("chat --model-path m --question hi --num-frames 8", "--num-frames 8"),
    ("chat --model-path m --question hi --max-image-side 9", "--max-image-side 9"),
    ("chat --model-path m --seed 1", "--seed 1: nothing is drawn"),
    ("chat --model-path m --top-p 0.5", "top_p is 0.5"),
    ("check-data d.json --version v1", "--version v1"),
    ("check-data d.json --max-length 5", "--max-length 5"),
    ("check-data d.json --tokens-per-image 576", "--tokens-per-image 576"),
    ("inspect --tokenizer t --records 0", "--records"),
    ("inspect d.json --tokenizer t --conversation a b", "--conversation takes their place"),
    ("inspect d.json --tokenizer t --json --ids", "--ids"),
    ("eval --model-path m --seed 0", "--seed 0"),
    ("eval --model-path m --task pope mme --split test", "--split test"),
    ("eval --model-path m --task easy-vqa --data-folder f", "--data-folder f"),
    ("eval --model-path m --task easy-vqa easy-vqa", "each once"),
    ("eval --model-path m --split dev", "--split dev: easy-vqa has test"),
    ("eval --model-path m --processes 2", "need --output-dir"),
    ("eval --model-path m --judge-model j", "--judge-model j"),
    ("eval --model-path m --task pope --data-folder {full}", "llava_pope_test.jsonl: no such file"),
    ("verify . --update", "--update"),
    ("verify . --files --atol 1", "--atol 1"),
    ("models --markdown --family llava-1.5", "--family llava-1.5"),
    ("merge-lora --model-path m --adapter a --output-dir {full}", "--output-dir"),
    ("export --model-path m --output-dir {full}", "--output-dir"),
]
"""Subcommands with their flags, and words of the error; `{full}` is a folder that holds a model."""

EVERY = 5
"""The share that is quick takes one combination of so many."""


def attacks(everything: bool, folder: Path) -> dict[str, Outcome]:
    """Each combination, in this process. No model is loaded."""
    full = folder / "full"
    full.mkdir()
    (full / "config.json").write_text("{}")
    tries = [(f"train.py {words}", named, lambda words=words: trained(words)) for words, named in TRAIN]
    for words, named in COMMANDS:
        tries.append((words, named, lambda words=words: said_by(words.format(full=full).split())))
    outcome = Outcome()
    for words, named, attempt in tries if everything else tries[::EVERY]:
        try:
            said = attempt()
        except FAULTS:
            outcome.failures.append(f"{words}: {traceback.format_exc()}")
            continue
        if named in said:
            outcome.counts["named"] += 1
        else:
            outcome.failures.append(f"{words}: {named!r} is not in {said!r}")
    return {"combinations of flags": outcome}


def trained(words: str) -> str:
    """What `train.py` says of flags; '' if it takes them."""
    try:
        with patch.dict(os.environ):
            parse_arguments(f"{BASE} {words}".split())
    except UserError as error:
        return str(error)
    return ""


def said_by(words: list[str]) -> str:
    """What a subcommand that refuses its flags prints; '' if it takes them."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        status = main(words)
    return printed.getvalue() if status == 2 else ""
