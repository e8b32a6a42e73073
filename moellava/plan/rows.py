# SPDX-License-Identifier: Apache-2.0
"""How the samples of a micro-batch will lie: asked of training, with what a plan has in a trainer's place."""

from __future__ import annotations

import copy
from typing import Any

from moellava.data.packing import PackedDataset
from moellava.moe import moe_layers
from moellava.train.arguments import TrainingArguments
from moellava.train.packing import lets_join
from moellava.train.sample_attention import SampleAttention, is_flash
from moellava.vlm import VLM


class PlannedAttention(SampleAttention):
    """A run's attention. Flash attention need not be installed where it is planned: torch's own over each sample, which
    is traced in its place, multiplies and keeps the same.

    Args:
        model: of the run.
        named: --attn_implementation.
    """

    def __init__(self, model: Any, named: str | None):
        super().__init__(model)
        self.is_flash = is_flash(named)

    def suits(self, longest: int) -> bool:
        """See `SampleAttention`."""
        return self.is_flash or super().suits(longest)


class PlannedRun:
    """What `moellava.train.packing` asks a trainer for.

    Args:
        vlm: the model, its weights without numbers.
        attention: of it.
        args: flags.
        samples: of a process and forward.
    """

    def __init__(self, vlm: VLM, attention: SampleAttention, args: TrainingArguments, samples: int):
        self.vlm, self.model, self.attention = vlm, vlm.model, attention
        self.is_moe = bool(moe_layers(vlm.model))
        self.args = copy.copy(args)
        self.args.per_device_train_batch_size = samples
        self.train_dataset = PackedDataset(None, [[0]], args.model_max_length) if args.packing else None


def shares_rows(vlm: VLM, args: TrainingArguments, named: str | None, samples: int) -> bool:
    """Whether so many samples of a process and forward will lie end to end in one row. Whether the model keeps them
    apart only its weights could say: the plan takes it that it does.

    Args:
        vlm: see `PlannedRun`.
        args: flags.
        named: --attn_implementation.
    """
    return lets_join(PlannedRun(vlm, PlannedAttention(vlm.model, named), args, samples))
