# SPDX-License-Identifier: Apache-2.0
"""Runs that end before their last step: by a signal, with a checkpoint; or by numbers that are not finite, without one.

Once a step, before the optimizer moves anything, all processes tell each other whether one of them has seen either.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from moellava.errors import UserError
from moellava.log import get_logger
from moellava.processes import joined_over_processes, rank, sum_over_processes
from moellava.train.checkpoint import last_checkpoint
from moellava.train.fsdp import own

logger = get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)

SAME_REQUEST_SECONDS = 3.0
"""Launchers pass one request on as several signals, within this time; a later one stops at once."""


class Stopped(Exception):
    """A run has been asked to end, and can go on.

    Args:
        number: of the signal.
        message: what is safe, and how to go on.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell calls the end by this signal: 143 or 130."""
        return 128 + self.number


class StopRequest:
    """The signal that this process has been sent, if any.

    Attributes:
        number: of the signal; 0 without one.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0

    def receive(self, number: int, frame: Any = None) -> None:
        """A signal's handler: notes the first one, and lets a later one end the process."""
        if not self.number:
            self.number, self._since = number, time.monotonic()
            logger.warning(
                "%s: finishing this step, then saving a checkpoint. A second signal stops at once.",
                signal.Signals(number).name,
            )
        elif time.monotonic() - self._since > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals are requests. Python handles them in its main thread alone; elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class StepWatch(TrainerCallback):
    """Stops a run whose numbers are not finite, and one that was asked to end.

    Args:
        trainer: a `StageTrainer`.
        request: of this process.
    """

    def __init__(self, trainer: Any, request: StopRequest):
        self.trainer = trainer
        self.request = request
        self.agreed = 0
        self.seen: list[tuple[dict[str, torch.Tensor], list[str]]] = []

    def see(self, measured: dict[str, torch.Tensor], records: list[str]) -> None:
        """Notes the losses of a micro-batch and its records. Nothing is looked at before the step's end."""
        self.seen.append((measured, records))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Before the weights move: raises UserError where a loss or the gradient is not finite; hears of signals.

        One question is asked of the device in a step, of whatever process and however many micro-batches.
        """
        norm = self.trainer.last_grad_norm
        numbers = [value for measured, _ in self.seen for value in measured.values()]
        if norm is not None and not args.fp16:  # there a gradient may overflow: the scaler leaves that step out
            numbers.append(torch.as_tensor(norm))
        bad = (~torch.isfinite(torch.stack([value.to(args.device, torch.float64) for value in numbers]))).any()
        # The larger of two signals would be their sum: each process counts in a place of its own.
        asked = torch.tensor([float(self.request.number == number) for number in SIGNALS], dtype=torch.float64)
        told = sum_over_processes(torch.cat([bad.double().view(1), asked.to(args.device)])).tolist()
        if told[0]:
            raise UserError(self._not_finite(args, state.global_step + 1))
        self.seen.clear()
        self.agreed = next((number for number, count in zip(SIGNALS, told[1:], strict=True) if count), 0)

    def _broken(self) -> list[str]:
        """What is not finite in this process, by record."""
        broken: list[str] = []
        for measured, records in self.seen:
            numbers = {name: float(value) for name, value in measured.items()}
            bad = [f"{name} {value}" for name, value in numbers.items() if not math.isfinite(value)]
            if bad:
                broken += [f"{', '.join(bad)} for {record}" for record in records or ["an unknown record"]]
        norm = self.trainer.last_grad_norm
        if not broken and norm is not None and not math.isfinite(float(norm)):
            records = [record for _, records in self.seen for record in records]
            broken += [f"a gradient of norm {float(norm)} for {name}" for name in records]
        return broken

    def _not_finite(self, args: Any, step: int) -> str:
        """The message, on every process; they come here together."""
        joined = joined_over_processes({(rank(), number): line for number, line in enumerate(self._broken())})
        lines = [joined[key] for key in sorted(joined)]
        more = [f"  … and {len(lines) - 20} more"] if len(lines) > 20 else []
        last = last_checkpoint(args.output_dir)
        way_out = (
            f"The last good checkpoint is {last}; no step was made after these records were seen."
            if last
            else "No checkpoint was complete before."
        )
        return "\n".join(
            [
                f"Step {step} is not finite, so the run stops before it changes the weights:",
                *(f"  {line}" for line in lines[:20]),
                *more,
                f"{way_out} The same command would come to the same step: lower --learning_rate, use --bf16 instead of "
                "--fp16, or leave the records out (--skip_list), in another --output_dir.",
            ]
        )

    def on_step_end(self, args, state, control, **kwargs):
        """After a step on which all agree to end: a checkpoint, whatever --save_strategy says."""
        if self.agreed:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args, state, control, **kwargs):
        """An epoch that was broken off has been saved already, and is not evaluated."""
        if self.agreed:
            control.should_save = control.should_evaluate = False

    def require_unstopped(self, args: Any) -> None:
        """Raises Stopped if the run was asked to end."""
        if self.agreed:
            name, last = signal.Signals(self.agreed).name, last_checkpoint(args.output_dir)
            raise Stopped(self.agreed, f"{name}: stopped, with {last} saved. Run the same command to go on.")


def require_finite(model: torch.nn.Module, step: int, last: object) -> None:
    """Raises UserError unless all trained weights are finite. Collective; looks at each process's own share.

    Args:
        model: what trains.
        step: after which it is about to be saved.
        last: the last complete checkpoint, or None.
    """
    bad = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not torch.isfinite(getattr(parameter, "ds_tensor", own(parameter))).all()
    ]
    device = next(model.parameters()).device
    if float(sum_over_processes(torch.tensor(float(len(bad)), device=device))):
        raise UserError(
            f"The weights are not finite after step {step} ({', '.join(bad[:3]) or 'on another process'}), and are not "
            f"saved; the last good checkpoint is {last or 'none'}. Lower --learning_rate, in another --output_dir."
        )
