# SPDX-License-Identifier: Apache-2.0
"""TRL's SFTTrainer, which is no dependency: pip puts it into a folder of the cache when a benchmark asks for it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

VERSION = "1.16.0"
FOLDER = Path.home() / ".cache" / "moellava" / "benchmarks" / f"trl-{VERSION}"


def installed() -> Any:
    """The package `trl`; what it needs comes from this environment. Raises ImportError: it cannot be had, and why."""
    if not (FOLDER / "trl").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(FOLDER)]
        done = subprocess.run([*command, f"trl=={VERSION}"], capture_output=True, text=True)
        if done.returncode:
            raise ImportError(f"pip: {done.stderr.strip().splitlines()[-1]}")
    sys.path.append(str(FOLDER))  # behind this environment, whose packages it shall use
    return importlib.import_module("trl")


def sft_trainer(model: Any, collator: Any, options: dict[str, Any]) -> Any:
    """An SFTTrainer that is handed its batches. Raises ImportError.

    Args:
        options: of `transformers.TrainingArguments`; what TRL sets otherwise (bf16, recomputed activations) is not set.
    """
    trl = installed()
    args = trl.SFTConfig(
        **options,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    data = Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]})  # not read
    return trl.SFTTrainer(
        model=model, args=args, data_collator=collator, train_dataset=data, processing_class=tokenizer
    )
