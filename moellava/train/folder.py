# SPDX-License-Identifier: Apache-2.0
"""What a stage leaves: one complete folder, whichever engine and however many processes trained it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from moellava.adapters.folder import (
    FOLDER,
    WEIGHTS,
    adapter_tensors,
    check_base,
    load_adapter,
    merged,
    read_adapter,
    write_adapter,
)
from moellava.adapters.lora import Adapter
from moellava.convert.tensor_files import TensorFiles
from moellava.errors import UserError
from moellava.log import get_logger
from moellava.model.weights import read_file, weight_files
from moellava.moe import gather_moe_state_dict, spread_shapes
from moellava.train.checkpoint import last_checkpoint
from moellava.train.fsdp import is_fsdp, load_part, whole_state
from moellava.train.masters import Masters
from moellava.vlm import VLM

logger = get_logger(__name__)

DRY_SAVE = ".dry-save"


@dataclass
class StageFolder:
    """Writes and reads the model of a run.

    A run with adapters leaves the merged model, as any stage does, and the adapter alone in peft's format beside it.
    The state dicts that are given here hold the adapters unmerged.

    Args:
        output_dir: the run's folder.
        vlm: its model.
        stage: the stage's name, for the config's `moellava` section.
        adapter: what was attached to the model; None without adapters.
        masters: fp32 copies that train in place of 16-bit weights; the stage's own folder is in 16 bits all the same.
    """

    output_dir: Path
    vlm: VLM
    stage: str
    adapter: Adapter | None = None
    masters: Masters | None = None

    def gather(self, model: nn.Module, wrapped: nn.Module, accelerator) -> dict[str, torch.Tensor]:
        """The whole state dict on the first process, experts under their global ids; {} elsewhere. Collective."""
        if is_fsdp(model):
            return whole_state(model)
        if is_sharded(model):
            return accelerator.get_state_dict(wrapped)
        return gather_moe_state_dict(model, lambda arriving: self._on_disk(model, arriving))

    def _on_disk(self, model: nn.Module, arriving: Iterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Other processes' experts as they come, mapped from a file without a name: the first process holds one tensor
        of them at a time, not all of the model."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(prefix=".experts-", dir=self.output_dir) as folder:
                files = TensorFiles(Path(folder), spread_shapes(model))
                for name, value in arriving:
                    files.write(name, value)
                return dict(read_file(Path(folder) / "model.safetensors"))  # mapped: it stays while it is used
        except OSError as error:
            raise UserError(
                f"--output_dir {self.output_dir} has no room for the experts of all processes, which lie there once "
                f"more while a folder is written: {error}"
            ) from error

    def write(self, state: dict[str, torch.Tensor], path: Path, final: bool = False) -> None:
        """Writes the folder; each file appears whole or not at all. The stage's own (`final`) has no fp32 masters."""
        if self.adapter is not None:
            section = self.vlm.section.but(stage=self.stage)
            self.adapter.origin["moellava"] = asdict(section)
            write_adapter(state, self.adapter, path / FOLDER)
        if final and self.masters is not None:
            state = self.masters.lowered(state)
        self.vlm.save(path, state_dict=self._whole(state), meta={"stage": self.stage})

    def _whole(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The state dict of the model without adapters."""
        return state if self.adapter is None else merged(state, self.adapter.scaling)

    def load(self, model: nn.Module, path: Path) -> None:
        """Copies what a checkpoint has trained into a model of the same shape (the native engine's resume)."""
        if self.adapter is not None:  # what lies under it is as the stage has built it anew
            stored, tensors = read_adapter(path / FOLDER, self.adapter.keywords)
            check_base(model.state_dict(), stored.origin, f"--model_name_or_path {self.adapter.origin['base']}")
            load_adapter(model, self.adapter, tensors, path / FOLDER)
            return
        load_whole(model, path)

    def dry_save(self, model: nn.Module, wrapped: nn.Module, accelerator) -> None:
        """Writes the folder once before step 0, compares every tensor with the model's, and removes it.

        A run of days must not find out at its end that it cannot save.
        """
        state = self.gather(model, wrapped, accelerator)
        if accelerator.is_main_process:
            path = self.output_dir / DRY_SAVE
            try:
                self.write(state, path)
                self._compare(path, state)
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"The dry save before step 0 failed: {error}. --output_dir {self.output_dir} needs room for the "
                    f"model ({sum(value.nbytes for value in state.values()) / 1e9:.1f} GB) more than once."
                ) from error
            finally:
                shutil.rmtree(path, ignore_errors=True)
        accelerator.wait_for_everyone()

    def _compare(self, path: Path, state: dict[str, torch.Tensor]) -> None:
        compare_saved(weight_files(path), self._whole(state))
        if self.adapter is not None:
            compare_saved([path / FOLDER / WEIGHTS], adapter_tensors(state, self.adapter))

    def failed_save(self, error: Exception, step: int) -> str:
        """The message of a save that failed: what is safe, and how to go on."""
        last = last_checkpoint(self.output_dir)
        safe = f"the last complete checkpoint is {last}" if last else "no checkpoint was complete before"
        return f"Saving at step {step} failed: {error}; {safe}. Make room, then run the same command to go on."


def is_sharded(model: nn.Module) -> bool:
    """True if each process holds a piece of every parameter only (DeepSpeed's ZeRO-3, or FSDP2)."""
    return is_fsdp(model) or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def load_whole(model: nn.Module, path: Path) -> None:
    """Copies the weights of a folder into a model, file by file. Raises UserError where they do not fit."""
    kept = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - kept
    missing = set(model.state_dict())
    for file in weight_files(path):
        part = dict(read_file(file))
        result = load_part(model, part) if is_fsdp(model) else model.load_state_dict(part, strict=False)
        if result.unexpected_keys:
            raise UserError(f"{file} holds tensors that this model has not: {result.unexpected_keys[:3]} …")
        missing -= set(part)
    if missing - tied:
        raise UserError(f"{path} lacks tensors of this model: {sorted(missing - tied)[:3]} …")


def compare_saved(files: list[Path], state: dict[str, torch.Tensor]) -> None:
    """Raises UserError unless every tensor of a state dict was saved as it is.

    One tensor of the files at a time is in memory: they are mapped, and each file is let go at its end.
    """
    found: set[str] = set()
    for file in files:
        for name, saved in read_file(file):
            found.add(name)
            if name in state and not torch.equal(saved, state[name].cpu()):
                raise UserError(f"The dry save before step 0 changed {name}: the folder could not be trusted.")
    # A tied tensor is stored once, under one of its names.
    stored = {state[name].data_ptr() for name in found & set(state)}
    lost = [name for name, value in state.items() if name not in found and value.data_ptr() not in stored]
    if lost:
        raise UserError(f"The dry save before step 0 lost {len(lost)} tensors: {', '.join(lost[:5])} …")
