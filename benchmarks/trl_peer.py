# SPDX-License-Identifier: Apache-2.0
"""TRL's SFTTrainer, handed the batches of a benchmark."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from peers import installed
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

PACKAGE = "trl==1.16.0"


def sft_trainer(model: Any, collator: Any, options: dict[str, Any]) -> Any:
    """An SFTTrainer that is handed its batches. Raises ImportError.

    Args:
        options: of `transformers.TrainingArguments`; what TRL sets otherwise (bf16, recomputed activations) is not set.
    """
    trl = installed(PACKAGE)
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
