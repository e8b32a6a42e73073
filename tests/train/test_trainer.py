# SPDX-License-Identifier: Apache-2.0
"""What happens around a step: how its loss is weighed, and which order an epoch has."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from moellava import heap
from moellava.data.sampler import GroupedSampler
from moellava.errors import UserError
from moellava.train import run_hooks
from moellava.train.run_hooks import RunHooks
from tests.model.tiny_language_models import tiny_language_model
from tests.processes import losses_of, train_here
from tests.tiny import weights_of


@pytest.mark.parametrize(("epoch", "number"), [(None, 0), (0.0, 0), (0.999999999, 1), (1.5, 1), (2.0, 2)])
def test_the_sampler_is_told_the_epoch(epoch, number):
    """A resumed run counts epochs by fractions, which may be off by a rounding."""
    sampler = GroupedSampler([1] * 8, None, batch_size=2)
    RunHooks(SimpleNamespace(train_sampler=sampler)).on_epoch_begin(
        None, SimpleNamespace(epoch=epoch, global_step=0, max_steps=9), None
    )
    assert sampler.epoch == number


def test_accumulated_batches_are_one_batch(flags_for, tmp_path):
    """Captions of different lengths: a mean over micro-batches would weigh their tokens differently."""
    one_step = {"max_steps": 1, "save_strategy": "no", "skip_dry_save": True, "learning_rate": 1e-2}
    splits = {"whole": (8, 1), "split": (2, 4)}
    for name, (batch, accumulated) in splits.items():
        size = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        train_here(flags_for(tmp_path, "pretrain") | one_step | size | {"output_dir": tmp_path / name})
    assert losses_of(tmp_path / "split") == pytest.approx(losses_of(tmp_path / "whole"), abs=1e-5)
    mine, reference = weights_of(tmp_path / "split"), weights_of(tmp_path / "whole")
    assert all(torch.allclose(mine[name], reference[name], atol=1e-5) for name in reference)


@pytest.mark.slow
def test_the_loss_of_evaluation_is_a_mean_over_tokens(flags_for, parts, run_train, tmp_path):
    """Whatever the batch size, and however many processes share the records; seven do not fill their batches."""
    records = json.loads((parts / "captions.json").read_text())[:7]
    for number, record in enumerate(records):
        record["conversations"][1]["value"] += " again" * (5 * number)
    (tmp_path / "eval.json").write_text(json.dumps(records))
    once = {"max_steps": 1, "save_strategy": "no", "skip_dry_save": True, "learning_rate": 1e-9}
    evaluated = once | {"eval_data_path": tmp_path / "eval.json", "eval_strategy": "steps", "eval_steps": 1}
    found = {}
    for batch in (1, 3, 7):
        more = {"per_device_eval_batch_size": batch, "output_dir": tmp_path / str(batch)}
        found[batch] = evaluation_of(train_here(flags_for(tmp_path, "pretrain") | evaluated | more))
    more = {"per_device_eval_batch_size": 2, "output_dir": tmp_path / "two"}
    done = run_train(flags_for(tmp_path, "pretrain") | evaluated | more, processes=2, launcher="torchrun")
    assert done.returncode == 0, done.stderr[-3000:]
    found["two"] = evaluation_of(tmp_path / "two")
    assert list(found.values()) == pytest.approx([found[1]] * 4, abs=1e-5)


def evaluation_of(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return next(entry["eval_loss"] for entry in history if "eval_loss" in entry)


@pytest.fixture
def sparse_flags(flags_for, tokenizer_folder, tmp_path):
    """(type of a sparse language model, stage) -> the flags of a run of two steps from it."""

    def flags_of(model_type, stage):
        base = tmp_path / "base"
        tiny_language_model(model_type).save_pretrained(base)
        shutil.copytree(tokenizer_folder, base, dirs_exist_ok=True)
        flags = flags_for(tmp_path, stage) | {"model_name_or_path": base, "max_steps": 2, "skip_dry_save": True}
        if flags.pop("pretrain_mm_mlp_adapter", None):
            flags["untrained_projector"] = True
        return flags | {"save_strategy": "no", "logging_steps": 1}

    return flags_of


@pytest.mark.parametrize(
    ("model_type", "stage", "given", "weight"),
    [
        ("qwen3_moe", "pretrain", None, 0.0),
        ("qwen3_moe", "finetune", None, 0.001),
        pytest.param("qwen3_moe", "finetune", 0.5, 0.5, marks=pytest.mark.slow),
        ("deepseek_v2", "finetune", 0.25, 0.25),
    ],
)
def test_a_sparse_language_model_trains_with_a_balance(model_type, stage, given, weight, sparse_flags, caplog):
    """Its own, or the usual one that a flag asks for. The loss and its experts' load are logged; where the language
    model is frozen, the loss counts nothing."""
    folder = train_here(sparse_flags(model_type, stage) | {"router_aux_loss_coef": given})
    log = [line for line in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "ce" in line]
    assert all(1.0 < line["aux"] < 4.0 for line in log)  # as many as a token chooses, 2, where the load is even
    assert sum(log[0][f"expert_load_image/layer_0/expert_{e}"] for e in range(4)) == pytest.approx(1.0)
    assert f"counts {weight:g} times" in caplog.text
    assert log[0]["loss"] == pytest.approx(log[0]["ce"] + weight * log[0]["aux"], abs=1e-4)


@pytest.mark.parametrize(
    ("model_type", "flags", "words"),
    [
        ("qwen3_moe", {"freeze_backbone": True}, "the language model, .* is frozen by --freeze_backbone True"),
        ("zamba", {}, "experts in the language model .* have no routers that tell their logits"),
        ("qwen3", {}, "--router_aux_loss_coef 0.25 needs --moe_enable True: .* no experts of its own"),
        ("qwen3_moe", {"router_z_loss_coef": 0.1}, "MoE flags need --moe_enable True.*--router_z_loss_coef 0.1"),
    ],
)
def test_a_balance_that_nothing_would_read_is_refused(model_type, flags, words, sparse_flags):
    with pytest.raises(UserError, match=words):
        train_here(sparse_flags(model_type, "finetune") | {"router_aux_loss_coef": 0.25} | flags)


def test_steps_use_freed_memory_again_and_a_run_leaves_none_behind(flags_for, tmp_path, monkeypatch):
    chosen, given_back = [], []
    monkeypatch.setattr(heap, "_choose", lambda options: chosen.append(options))
    monkeypatch.setattr(run_hooks, "give_back", lambda: given_back.append(list(chosen)))
    train_here(flags_for(tmp_path, "pretrain") | {"max_steps": 2, "save_steps": 1})
    assert chosen == [heap.KEPT, heap.USUAL]
    assert given_back == [[heap.KEPT]] * 3, "before the first step, and after each save"
