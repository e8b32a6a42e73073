# SPDX-License-Identifier: Apache-2.0
"""What a step of training does, counted: a number that other programs on the machine do not change.

The bounds are today's counts and a twentieth more, for what versions of torch and transformers differ in.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from moellava.train.trainer import StageTrainer
from tests.processes import Flags, train_here


class Operations(TorchDispatchMode):
    """Counts the operations that torch runs, forward and backward, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.names[str(function).removeprefix("aten.").partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def counted(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The operations of a run's last step: before it, a run also looks at what is exact."""
    found, step = [], StageTrainer.training_step

    def counting(self: StageTrainer, *args: Any, **options: Any) -> Any:
        with Operations() as operations:
            loss = step(self, *args, **options)
        found.append(operations.names)
        return loss

    with monkeypatch.context() as patched:
        patched.setattr(StageTrainer, "training_step", counting)
        train_here(flags | {"max_steps": 3, "skip_dry_save": True, "save_strategy": "no"})
    return found[-1]


VIEWS = {"view", "transpose", "slice", "detach"}
ATTENTION = {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"}


def test_a_step_runs_few_operations_and_per_sample_attention_alone(flags_for, tmp_path, monkeypatch):
    """Of four layers, the two sparse ones of stage 3 with four experts each, forward and backward."""
    for stage, most in (("pretrain", 1076), ("finetune", 1307), ("moe", 1611)):
        flags = flags_for(tmp_path, stage) | {"per_device_train_batch_size": 2}
        two = counted(flags, monkeypatch)
        assert two.total() <= most, (stage, two)
        six = counted(flags | {"per_device_train_batch_size": 6, "output_dir": tmp_path / f"{stage}-6"}, monkeypatch)
        assert ATTENTION <= {*(six - two)} <= VIEWS | ATTENTION, stage
