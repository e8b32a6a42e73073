# SPDX-License-Identifier: Apache-2.0
"""What HF's Trainer lacks for models that `fsdp.shard` has sharded: checkpoints that a run can go on from. And that one
run in a process leaves nothing of its engine to the next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from moellava.train.fsdp import is_fsdp, load_states, require_same_engine, save_states, whole

USES_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
"""What accelerate sets in the environment when a run uses DeepSpeed, and takes for the user's wish in the next one."""


class FSDPTrainer(Trainer):
    """HF's Trainer, whose model may be sharded.

    Args:
        model, args: of `transformers.Trainer`, as are `kwargs`.
    """

    def __init__(self, *, model: Any, args: Any, **kwargs):
        self.is_fsdp = is_fsdp(model)
        given, args.save_only_model = args.save_only_model, self.is_fsdp  # else HF refuses to save, since it cannot
        super().__init__(model=model, args=args, **kwargs)
        args.save_only_model = given

    def create_accelerator_and_postprocess(self):
        """As HF's; that this run uses DeepSpeed, or not, is not left behind for the next one in this process."""
        before = os.environ.get(USES_DEEPSPEED)
        super().create_accelerator_and_postprocess()
        os.environ.pop(USES_DEEPSPEED, None)
        if before is not None:
            os.environ[USES_DEEPSPEED] = before

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return whole(norm) if isinstance(norm, torch.Tensor) else norm

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_states(self.model, self.optimizer, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            require_same_engine(Path(checkpoint), self.is_fsdp)
        if checkpoint is None or not self.is_fsdp:
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_states(self.model, self.optimizer, Path(checkpoint))
        stored = torch.load(Path(checkpoint) / SCHEDULER_NAME, map_location="cpu", weights_only=True)
        self._load_schedule(stored)

    def _load_schedule(self, stored: dict[str, Any]) -> None:
        """Goes on in a schedule. What is there by group stays: how many there are depends on --ep_size."""
        schedule: Any = self.lr_scheduler
        known = {name: value for name, value in stored.items() if not isinstance(value, list)}
        schedule.load_state_dict(schedule.state_dict() | known)
        places = zip(self.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
        for group, rate, factor in places:
            group["lr"] = rate * factor(schedule.last_epoch)
