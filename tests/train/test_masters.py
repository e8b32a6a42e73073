# SPDX-License-Identifier: Apache-2.0
"""16-bit runs without DeepSpeed train fp32 masters, and leave 16-bit folders."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.processes import losses_of, train_here
from tests.tiny import weights_of

SMALL = {"learning_rate": 2e-5, "skip_dry_save": True, "bf16": True, "version": "qwen"}


@pytest.fixture(scope="module")
def start(flags_for, parts, tmp_path_factory):
    """(flags, folder) of ten steps of stage 2 in bf16, from stage 1 in fp32."""
    root = tmp_path_factory.mktemp("masters")
    train_here(flags_for(root, "pretrain") | {"max_steps": 1, "save_strategy": "no", "skip_dry_save": True})
    flags = flags_for(root, "finetune") | SMALL | {"max_steps": 10, "save_steps": 5, "save_total_limit": 2}
    return flags, train_here(flags)


def test_norms_move_at_a_small_rate(start, parts):
    flags, folder = start
    before, after = weights_of(parts / "lm"), weights_of(folder / "checkpoint-10")
    norms = [name for name in after if "norm.weight" in name and "language_model" in name]
    assert len(norms) >= 5
    for name in norms:
        old = before[next(key for key in before if name.endswith(key.removeprefix("model.")))]
        assert after[name].dtype == torch.float32
        assert not torch.equal(after[name], old.float()), name


def test_masters_begin_with_every_bit_of_the_folder(start, parts, tmp_path):
    """The first step of a warmup has a rate of 0: what is saved is what the run began with."""
    warmup = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "max_steps": 2, "save_steps": 1}
    flags = start[0] | {"output_dir": str(tmp_path)} | warmup
    began = weights_of(train_here(flags) / "checkpoint-1")
    stored = {name.removeprefix("model."): value for name, value in weights_of(parts / "lm").items()}
    compared = {name: stored[end] for name in began for end in stored if name.endswith(f"language_model.{end}")}
    compared = {name: value for name, value in compared.items() if value.shape == began[name].shape}  # no words added
    assert len(compared) >= 10 and any(not torch.equal(value, value.bfloat16().float()) for value in compared.values())
    for name, value in compared.items():
        assert torch.equal(began[name], value), name


def test_the_folder_of_the_stage_is_in_16_bits(start):
    for name, value in weights_of(start[1]).items():
        assert value.dtype == torch.bfloat16, name
    assert '"dtype": "bfloat16"' in (start[1] / "config.json").read_text()


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(start, begin_at, tmp_path):
    flags, folder = start
    resumed = begin_at(5, folder, tmp_path / "resumed")
    train_here(flags | {"output_dir": resumed})
    assert losses_of(resumed) == losses_of(folder)
    mine, reference = weights_of(resumed), weights_of(folder)
    assert all(torch.equal(mine[name], reference[name]) for name in reference)


@pytest.mark.slow
def test_experts_train_in_16_bits_too(start, flags_for, tmp_path):
    shutil.copytree(start[1], tmp_path / "finetune")
    flags = flags_for(tmp_path, "moe") | SMALL | {"max_steps": 2, "save_strategy": "no", "skip_dry_save": False}
    folder = train_here(flags)
    in_fp32 = {name for name, value in weights_of(folder).items() if value.dtype != torch.bfloat16}
    assert all("router" in name for name in in_fp32), "routers are in fp32 whatever the rest is"
    assert all(0 < loss < 20 for loss in losses_of(folder).values())


@pytest.mark.slow
def test_adapters_train_in_16_bits_too(start, flags_for, tmp_path):
    shutil.copytree(start[1], tmp_path / "pretrain")
    flags = flags_for(tmp_path, "finetune") | SMALL | {"max_steps": 2, "save_strategy": "no", "skip_dry_save": False}
    folder = train_here(flags | {"lora_enable": True, "lora_r": 4, "lora_alpha": 8})
    assert {value.dtype for value in weights_of(folder).values()} == {torch.bfloat16}
