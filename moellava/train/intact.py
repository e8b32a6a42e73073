# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is as it was written, or refused; and nothing in it is code that runs.

Digests of all its files lie beside them. They are no secret, so they guard against damage alone: against code that
somebody has put into a file, each is read with torch's `weights_only`, DeepSpeed's own among them.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from moellava.data.scan import shared
from moellava.errors import UserError
from moellava.files import DIGESTS, file_digest, read_json, write_json

STATE = "trainer_state.json"
THREADS = 8
"""Files that are read side by side; hashing leaves Python's lock to others."""

FORCE = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
"""What makes torch read every file as data, also where its caller (DeepSpeed) says otherwise."""


def write_digests(checkpoint: Path) -> None:
    """Notes the digest of every file of a checkpoint, by its path in it."""
    names = [name for name in _names(checkpoint) if name != DIGESTS]
    write_json(checkpoint / DIGESTS, {"sha256": dict(zip(names, _digests(checkpoint, names), strict=True))})


def _names(checkpoint: Path) -> list[str]:
    return sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())


def _digests(checkpoint: Path, names: list[str]) -> list[str]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda name: file_digest(checkpoint / name), names))


def require_intact(checkpoint: Path, others: list[Path]) -> None:
    """Raises UserError, with the way out, unless a checkpoint is whole. Collective: processes share the reading.

    Args:
        checkpoint: a folder.
        others: older checkpoints of its run, oldest first.
    """
    problems = problems_of(checkpoint)
    if problems:
        instead = f"go on from {others[-1]}" if others else "start anew"
        raise UserError(
            f"{checkpoint} is not as it was written: {'; '.join(problems[:5])}. A run that went on from it would not "
            f"be the same. Put the files back, or remove the folder to {instead}."
        )


def problems_of(checkpoint: Path) -> list[str]:
    """What is missing from a checkpoint, or has changed in it. Collective."""
    path = checkpoint / DIGESTS
    if not path.is_file():
        return [f"it has lost {DIGESTS}"]
    try:
        recorded = read_json(path)["sha256"]
        names = sorted(str(name) for name in recorded)
        wanted = [recorded[name] for name in names]
    except (UserError, KeyError, TypeError):
        return [f"{DIGESTS} is damaged"]
    there = shared(names, lambda share: [(checkpoint / name).is_file() for name in share])
    lost = [f"it has lost {name}" for name, is_there in zip(names, there, strict=True) if not is_there]
    if lost:
        return lost
    found = shared(names, lambda share: _digests(checkpoint, list(share)))
    changed = [f"{name} has changed" for name, old, new in zip(names, wanted, found, strict=True) if old != new]
    return changed or _state_problems(checkpoint)


def _state_problems(checkpoint: Path) -> list[str]:
    """What is wrong with the step that a checkpoint says it is of."""
    try:
        step = read_json(checkpoint / STATE)["global_step"]
    except (UserError, KeyError, TypeError):
        return [f"{STATE} is damaged"]
    return [] if checkpoint.name == f"checkpoint-{step}" else [f"{STATE} is of step {step}"]


@contextmanager
def reading(checkpoint: Path | None, with_deepspeed: bool) -> Iterator[None]:
    """Inside, whatever torch reads is read as data. Raises UserError for a file that holds code.

    Args:
        checkpoint: what is read, for the message.
        with_deepspeed: whether DeepSpeed's own files are among it.
    """
    before = {name: os.environ.get(name) for name in FORCE}
    os.environ.update(FORCE)
    try:
        with torch.serialization.safe_globals(deepspeed_classes() if with_deepspeed else []):
            yield
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{checkpoint} holds more than states and is not read, since it could run code: {reason} "
            "Nobody but this run should have written there: remove the folder."
        ) from error
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def deepspeed_classes() -> list[type]:
    """What DeepSpeed's own files hold beside tensors and numbers."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
