# SPDX-License-Identifier: Apache-2.0
"""A run is told by the samples of a step: it goes on with another number of processes, to the same numbers."""

from __future__ import annotations

import json
import random
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from moellava.errors import UserError
from moellava.moe import MoESpec
from moellava.train.checkpoint import check_folder, claim_folder, mark_finished, read_run
from moellava.train.identity import SAMPLES, renewed
from moellava.train.split import (
    Split,
    begin_random,
    in_words,
    keep_samples,
    require_same_numbers,
    require_same_step,
    ways_to_keep,
)
from tests.processes import train_here
from tests.tiny import weights_of

DEFAULT = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


@pytest.fixture
def run_of(tmp_path):
    """Split -> the folder of a run that has come to an end with it."""

    def leave(split: Split):
        claim_folder(tmp_path, {SAMPLES: split.samples}, split=split, asked=split)
        mark_finished(tmp_path)
        return tmp_path

    return leave


@pytest.mark.parametrize(
    "given, processes, passes",
    [
        ({"per_device_train_batch_size": 2}, 4, None),
        ({"per_device_train_batch_size": 2}, 2, 2),
        ({"per_device_train_batch_size": 2}, 1, 4),
        ({"per_device_train_batch_size": 2}, 3, None),
        ({"per_device_train_batch_size": 2}, 8, None),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, 2, None),
        ({"per_device_train_batch_size": 4}, 1, None),
    ],
)
def test_the_same_command_keeps_its_samples(given, processes, passes, run_of, caplog):
    flags = {"output_dir": str(run_of(Split(2, 1, 4)))} | given
    kept = keep_samples(flags, DEFAULT, processes)
    assert kept == flags | ({} if passes is None else {"gradient_accumulation_steps": passes})
    if passes is not None:
        assert f"steps of 8 samples, by {in_words(processes)} now" in caplog.text


def test_a_folder_without_a_run_changes_nothing(tmp_path):
    for flags in ({}, {"output_dir": str(tmp_path)}):
        assert keep_samples(flags, DEFAULT, 3) == flags


def test_another_step_is_refused_with_what_would_keep_it(run_of):
    folder = run_of(Split(2, 1, 4))
    require_same_step(folder, Split(4, 2, 1))
    with pytest.raises(UserError, match=r"holds a run with 8 samples in a step, but .* 2 processes are 4") as error:
        require_same_step(folder, Split(2, 1, 2))
    assert "Give --gradient_accumulation_steps 2 or --per_device_train_batch_size 4, which" in str(error.value)
    assert ways_to_keep(8, Split(3, 3, 2)).startswith(
        "Give --per_device_train_batch_size 4 --gradient_accumulation_steps 1, which"
    )
    assert ways_to_keep(8, Split(1, 1, 3)) == ("3 processes cannot share 8 samples evenly: go on with 1, 2, 4, 8.")


BEFORE = {"processes": 2, "--per_device_train_batch_size": 4, "--gradient_accumulation_steps": 2, "--seed": 1}


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    claim_folder(tmp_path, BEFORE)
    mark_finished(tmp_path)
    assert check_folder(tmp_path, {SAMPLES: 16, "--seed": 1})
    assert read_run(tmp_path)["split"] == list(Split(4, 2, 2))
    grouped = renewed({"identity": BEFORE | {"--group_by_modality_length": True}})["identity"]
    assert grouped["order of the samples"] == "that of an earlier version of moellava"


def trainer_of(folder, split: Split, spec: dict | None = None, own_routers: object = None, mean: bool = True):
    """What `require_same_numbers` asks of a trainer."""
    batch = {"train_batch_size": split.batch, "gradient_accumulation_steps": split.accumulation}
    args = SimpleNamespace(**batch, world_size=split.processes, output_dir=folder, average_tokens_across_devices=mean)
    vlm = SimpleNamespace(spec=MoESpec(**spec) if spec is not None else None)
    return SimpleNamespace(args=args, vlm=vlm, is_moe=spec is not None, own_routers=own_routers)


PASSES, BATCHES = Split(2, 2, 2), Split(4, 1, 2)


@pytest.mark.parametrize(
    "options, same, other, named",
    [
        ({"spec": {"drop_tokens": True}}, PASSES, BATCHES, "capacity"),
        ({"spec": {"router_balance": "first_choice"}}, PASSES, BATCHES, "--router_balance first_choice"),
        ({"own_routers": object()}, PASSES, BATCHES, "own experts"),
        ({"spec": {"router_balance": "batch"}}, Split(8, 1, 1), PASSES, "--router_balance batch"),
        ({"mean": False}, Split(2, 1, 4), PASSES, "--average_tokens_across_devices False"),
    ],
)
def test_what_depends_on_the_split_is_refused_by_name(options, same, other, named, run_of, tmp_path):
    folder = run_of(Split(2, 1, 4))
    for split in (PASSES, BATCHES, Split(8, 1, 1)):
        require_same_numbers(trainer_of(folder, split, spec={}), tmp_path)
    require_same_numbers(trainer_of(folder, same, **options), tmp_path)
    with pytest.raises(UserError, match=f"× 4 processes, and now these are .*: .*{named}.* Keep "):
        require_same_numbers(trainer_of(folder, other, **options), tmp_path)


def test_random_numbers_follow_from_seed_step_and_process():
    drawn = set()
    for place in [(1, 2, 0), (1, 2, 1), (1, 3, 0), (2, 2, 0)]:
        first, again = [], []
        for numbers in (first, again):
            begin_random(*place)
            numbers += [random.random(), torch.rand(1).item()]
        assert first == again
        drawn.add(tuple(first))
    assert len(drawn) == 4


def test_a_run_goes_on_with_its_steps_split_anew(flags_for, begin_at, losses_of, tmp_path, caplog):
    """Written by two processes; passes of one sample become passes of three; the last step of each epoch, which is not
    full, stays whole."""
    flags = flags_for(tmp_path, "pretrain") | {
        "skip_dry_save": True,
        "lr_scheduler_type": "cosine",
        "save_total_limit": 9,
    }
    flags |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "max_steps": 4, "save_steps": 2}
    whole = train_here(flags | {"output_dir": tmp_path / "whole"})
    folder = begin_at(2, whole, tmp_path / "split")
    with pytest.raises(UserError, match=r"--output_dir .* with 9 samples .*--gradient_accumulation_steps 9 "):
        train_here(flags | {"output_dir": folder, "per_device_train_batch_size": 1})
    train_here(flags | {"output_dir": folder, "per_device_train_batch_size": 9, "gradient_accumulation_steps": 1})
    assert "Going on from" in caplog.text
    assert losses_of(folder) == pytest.approx(losses_of(whole), abs=1e-5)
    mine, reference = weights_of(folder), weights_of(whole)
    assert all(torch.allclose(mine[name], reference[name], atol=1e-5) for name in reference)


@pytest.fixture(scope="module")
def nine(parts, tmp_path_factory):
    """A folder of runs with nine conversations, so that the last step of an epoch is not full."""
    folder = tmp_path_factory.mktemp("nine")
    (folder / "sft.json").write_text(json.dumps(json.loads((parts / "sft.json").read_text())[:9]))
    return folder


OF_STAGE = {"finetune": {"untrained_projector": True, "pretrain_mm_mlp_adapter": None}, "moe": {}}


@pytest.fixture(scope="module")
def moving(nine, flags_for):
    """stage -> flags of a run over the nine conversations, whose rate moves."""
    data = {"data_path": nine / "sft.json", "lr_scheduler_type": "cosine", "skip_dry_save": True}
    return lambda stage: flags_for(nine, stage) | data | OF_STAGE[stage]


@pytest.fixture(scope="module")
def uninterrupted(moving):
    """stage -> the run of one process that nothing has stopped; stage 3 goes on from stage 2."""

    @cache
    def run(stage: str):
        if stage == "moe":
            run("finetune")
        return train_here(moving(stage) | {"per_device_train_batch_size": 4})

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, settings, spread",
    [("finetune", "zero2", {}), ("finetune", "zero3", {}), ("moe", "zero2", {"ep_size": 2})],
    ids=["zero2", "zero3", "experts"],
)
def test_a_killed_run_goes_on_with_fewer_processes_and_with_more(
    stage, settings, spread, moving, uninterrupted, kill_train, run_train, losses_of, tmp_path
):
    """Two processes, SIGKILL; one with the same flags, SIGKILL; two: the numbers of one that nothing has stopped.

    The last step of an epoch has nothing for one of two processes; under ZeRO-3 it gathers what the other one does,
    also where layers are computed again."""
    whole = uninterrupted(stage)
    flags = moving(stage) | {"output_dir": tmp_path / "run", "deepspeed": settings}
    flags |= {"activation_checkpointing": settings == "zero3"}
    kill_train(flags | spread, "checkpoint-2", processes=2)
    kill_train(flags, "checkpoint-4", processes=1)
    done = run_train(flags | spread, processes=2)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(whole), abs=1e-5)
    mine, reference = weights_of(tmp_path / "run"), weights_of(whole)
    assert mine.keys() == reference.keys()
    apart = {name: float((mine[name] - reference[name]).abs().max()) for name in reference}
    assert max(apart.values()) < 1e-4, apart
