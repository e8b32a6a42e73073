# SPDX-License-Identifier: Apache-2.0
"""Models that are sharded without DeepSpeed: FSDP2, and the expert parallelism of language models that are sparse of
themselves."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration, get_scheduler

from moellava.errors import UserError
from moellava.train.arguments import parse_arguments
from moellava.train.fsdp import check_shards, require_same_engine
from moellava.train.fsdp_trainer import FSDPTrainer
from tests import tiny
from tests.model.tiny_language_models import tiny_language_model
from tests.older import SHARDS
from tests.processes import ROOT, launched, losses_of, run, run_train, train_here, words_of
from tests.train.fsdp_of_two import sparse_model


@SHARDS
@pytest.mark.slow
def test_one_of_two_processes_holds_its_share():
    own = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "train" / "fsdp_of_two.py")]
    done = run([sys.executable, *own], cwd=ROOT, fresh=True)
    assert done.returncode == 0 and "14 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("make", "ep_size", "words"),
    [
        (tiny.tiny_llava, 2, "spreads no experts of .* .llama. .* Leave --ep_size out"),
        (sparse_model, 3, "--ep_size does not divide the 4 experts"),
    ],
)
def test_what_cannot_be_sharded_is_refused(make, ep_size, words):
    with pytest.raises(UserError, match=words):
        check_shards(make(), "this model", 6, ep_size)


def test_a_transformers_that_shards_no_copies_is_named(monkeypatch):
    monkeypatch.setattr("moellava.train.conflicts.holds_copies", lambda: False)
    with pytest.raises(UserError, match="--fsdp_size 2 needs a newer transformers .* --deepspeed zero3 splits"):
        parse_arguments(words_of({"model_name_or_path": "lm", "data_path": "a", "output_dir": "o", "fsdp_size": 2}))


def test_experts_may_stay_together():
    for model in (tiny.tiny_llava("llama"), sparse_model()):
        check_shards(model, "this model", 2, 1)


def test_a_schedule_goes_on_with_another_number_of_groups():
    def schedule(groups: int) -> SimpleNamespace:
        each = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0} for _ in range(groups)]
        optimizer = torch.optim.SGD(each, lr=1.0)
        made = get_scheduler("linear", optimizer, num_warmup_steps=4, num_training_steps=8)
        return SimpleNamespace(optimizer=optimizer, lr_scheduler=made)

    before, after = schedule(1), schedule(2)
    for _ in range(3):
        before.optimizer.step()
        before.lr_scheduler.step()
    FSDPTrainer._load_schedule(after, before.lr_scheduler.state_dict())
    assert [group["lr"] for group in after.optimizer.param_groups] == [0.75, 0.75]
    after.optimizer.step()
    after.lr_scheduler.step()
    assert after.lr_scheduler.get_last_lr() == [1.0, 1.0]


def test_a_checkpoint_of_another_engine_is_refused(tmp_path):
    require_same_engine(tmp_path, False)
    with pytest.raises(UserError, match="was written without --fsdp_size"):
        require_same_engine(tmp_path, True)
    (tmp_path / "fsdp").mkdir()
    with pytest.raises(UserError, match="was written with --fsdp_size"):
        require_same_engine(tmp_path, False)


def write_sparse(folder: Path, tokenizer: Path) -> Path:
    """A language model that is sparse of itself, with a tokenizer."""
    tiny_language_model("qwen2_moe").save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


def start_of_sparse(tokenizer: Path, folder: Path) -> dict[str, object]:
    """Flags of stage 2 from a language model that is sparse of itself."""
    start = {"model_name_or_path": write_sparse(folder / "base", tokenizer), "untrained_projector": True}
    return start | {"pretrain_mm_mlp_adapter": None}


def history_of(folder: Path) -> list[dict[str, float]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line for line in history if "loss" in line]


@SHARDS
@pytest.mark.slow
def test_two_processes_are_one_and_go_on_in_other_pieces(flags_for, tokenizer_folder, tmp_path, begin_at):
    flags = flags_for(tmp_path, "finetune") | {"max_steps": 4, "save_total_limit": 5, "router_aux_loss_coef": 0.01}
    flags |= start_of_sparse(tokenizer_folder, tmp_path)
    flags |= {"eval_data_path": flags["data_path"], "eval_strategy": "epoch"}
    flags |= {"lr_scheduler_type": "linear", "warmup_steps": 3, "eval_samples": 1}
    one = train_here(flags | {"per_device_train_batch_size": 8, "output_dir": tmp_path / "one"})

    flags |= {"per_device_train_batch_size": 4}
    spread = flags | {"fsdp_size": 2, "ep_size": 2, "output_dir": tmp_path / "two"}
    done = run_train(spread, processes=2, launcher="torchrun", fresh=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(one), abs=1e-5)
    first, second = (history_of(folder)[0] for folder in (one, tmp_path / "two"))
    assert first.keys() == second.keys() and "aux" in first
    wanted, found = tiny.weights_of(one), tiny.weights_of(tmp_path / "two")
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=0)
    assert not list((tmp_path / "two").rglob("*.distcp")), "its index would be a pickle"

    plain, ours = LlavaForConditionalGeneration.from_pretrained(tmp_path / "two"), tiny.reopen(tmp_path / "two")
    probe = ours.probes()["image"]
    assert torch.equal(plain(**probe).logits, ours.model(**probe).logits)

    begin_at(2, tmp_path / "two", tmp_path / "again")
    done = run_train(flags | {"fsdp_size": 2, "output_dir": tmp_path / "again"}, processes=2, launcher="torchrun")
    assert done.returncode == 0, done.stderr[-3000:]
    again = tiny.weights_of(tmp_path / "again")
    for name, value in found.items():
        torch.testing.assert_close(again[name], value, atol=1e-6, rtol=0)


@SHARDS
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "run", "rounding"),
    [("bfloat16", "float32", 1e-5), ("float16", "float32", 1e-5), ("float32", "bfloat16", 5e-3)],
)
def test_folders_of_another_dtype_train_in_pieces(flags_for, parts, tmp_path, stored, run, rounding):
    """Losses are those of one process; under --bf16 that computes norms in fp32, and pieces are gathered as bf16."""
    lm = AutoModelForCausalLM.from_pretrained(parts / "lm", dtype=getattr(torch, stored))
    shutil.copytree(parts / "lm", tmp_path / "lm")
    lm.save_pretrained(tmp_path / "lm")
    flags = flags_for(tmp_path, "finetune") | {"model_name_or_path": tmp_path / "lm", "untrained_projector": True}
    flags |= {"pretrain_mm_mlp_adapter": None, "max_steps": 3, "save_strategy": "no", "bf16": run == "bfloat16"}
    one = train_here(flags | {"per_device_train_batch_size": 8, "output_dir": tmp_path / "one"})
    flags |= {"per_device_train_batch_size": 4, "fsdp_size": 2, "output_dir": tmp_path / "two"}
    done = run_train(flags, processes=2, launcher="torchrun")
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(one), abs=rounding)
    kinds = [{value.dtype for value in tiny.weights_of(folder).values()} for folder in (one, tmp_path / "two")]
    assert kinds == [{getattr(torch, run)}] * 2


@SHARDS
@pytest.mark.slow
def test_adapters_and_copies_train_in_pieces(flags_for, tokenizer_folder, tmp_path):
    """Four processes, two of which hold a copy together, with adapters and checkpoints; at the end all are asked about
    pictures, which go through the tower alone."""
    flags = flags_for(tmp_path, "finetune") | {"max_steps": 2, "save_strategy": "no", "lora_enable": True}
    flags |= start_of_sparse(tokenizer_folder, tmp_path)
    flags |= {"lora_dropout": 0, "lora_r": 4, "activation_checkpointing": True}
    one = train_here(flags | {"per_device_train_batch_size": 8, "output_dir": tmp_path / "one"})
    spread = {"fsdp_size": 2, "ep_size": 2, "output_dir": tmp_path / "four"}
    spread |= {"eval_task": "easy-vqa", "eval_task_limit": 2, "eval_steps": 2}
    done = run_train(flags | spread, processes=4, launcher="torchrun")
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses_of(tmp_path / "four") == pytest.approx(losses_of(one), abs=1e-5)
    history = json.loads((tmp_path / "four" / "trainer_state.json").read_text())["log_history"]
    assert any("easy-vqa" in name for line in history for name in line)
    wanted, found = tiny.weights_of(one / "adapter"), tiny.weights_of(tmp_path / "four" / "adapter")
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=0)


ODD = {"hidden_size": 28, "head_dim": 14, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 3}
ODD |= {"moe_intermediate_size": 20, "vocab_size": 289, "tie_word_embeddings": True}
"""Of a language model: sizes that three processes do not share evenly, and a head that is the embedding."""


@SHARDS
@pytest.mark.slow
def test_three_processes_with_odd_sizes_are_one_and_two_go_on(flags_for, tokenizer_folder, tmp_path, begin_at):
    """What adapters, a tower that trains (whose last norm nothing reads) and tied words leave in a checkpoint is found
    again; the last step of an epoch has one sample for three processes."""
    flags = flags_for(tmp_path, "finetune") | start_of_sparse(tokenizer_folder, tmp_path)
    tiny_language_model("qwen2_moe", **ODD).save_pretrained(tmp_path / "base")
    few = json.loads(Path(str(flags["data_path"])).read_text())[:7]
    (tmp_path / "seven.json").write_text(json.dumps(few))
    flags |= {"data_path": tmp_path / "seven.json", "max_steps": None, "num_train_epochs": 2, "save_total_limit": 5}
    flags |= {"save_steps": 1, "lora_enable": True, "lora_dropout": 0, "lora_r": 4, "train_vision_encoder": True}
    flags |= {"router_aux_loss_coef": 0.0, "per_device_train_batch_size": 1, "activation_checkpointing": True}
    one = train_here(flags | {"gradient_accumulation_steps": 6, "output_dir": tmp_path / "one"})

    three = flags | {"fsdp_size": 3, "ep_size": 3, "gradient_accumulation_steps": 2, "output_dir": tmp_path / "three"}
    done = run_train(three, processes=3, launcher="torchrun")
    assert done.returncode == 0, done.stderr[-3000:]
    begin_at(3, tmp_path / "three", tmp_path / "two")
    two = flags | {"fsdp_size": 2, "gradient_accumulation_steps": 3, "output_dir": tmp_path / "two"}
    done = run_train(two, processes=2, launcher="torchrun")
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in (tmp_path / "three", tmp_path / "two"):
        assert losses_of(folder) == pytest.approx(losses_of(one), abs=1e-5)
        wanted, found = tiny.weights_of(one), tiny.weights_of(folder)
        assert wanted.keys() == found.keys() and "lm_head.weight" not in found
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, atol=1e-4, rtol=0, msg=name)


@SHARDS
@pytest.mark.slow
def test_features_of_a_tower_in_pieces_are_kept(flags_for, tokenizer_folder, tmp_path):
    """Of a model whose layers have no groups of their own, and is whole behind each forward; the second run, of one
    process, knows the pictures."""
    flags = flags_for(tmp_path, "finetune") | start_of_sparse(tokenizer_folder, tmp_path) | {"max_steps": 2}
    tiny_language_model("dbrx").save_pretrained(tmp_path / "base")
    flags |= {"cache_features": tmp_path / "features", "router_aux_loss_coef": 0.0, "save_strategy": "no"}
    two = flags | {"fsdp_size": 2, "per_device_train_batch_size": 4, "output_dir": tmp_path / "two"}
    done = run_train(two, processes=2, launcher="torchrun")
    assert done.returncode == 0, done.stderr[-3000:]
    one = train_here(flags | {"per_device_train_batch_size": 8, "output_dir": tmp_path / "one"})
    assert "Features: 3 pictures, 3 of them known before" in (one / "run.log").read_text()
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(one), abs=1e-5)


@SHARDS
@pytest.mark.slow
def test_the_launcher_of_deepspeed_starts_it_too(flags_for, tokenizer_folder, tmp_path):
    """It sets other variables than torchrun, and adds a flag; DeepSpeed itself is not asked for."""
    flags = flags_for(tmp_path, "finetune") | {"max_steps": 2}
    flags |= start_of_sparse(tokenizer_folder, tmp_path)
    one = train_here(flags | {"per_device_train_batch_size": 8, "output_dir": tmp_path / "one"})
    own = {"fsdp_size": 2, "ep_size": 2, "per_device_train_batch_size": 4, "output_dir": tmp_path / "two"}
    words = [str(ROOT / "train.py"), *words_of(flags | own)]
    done = run([*launched(2, "deepspeed", fresh=True), *words], fresh=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(one), abs=1e-5)
    assert (tmp_path / "two" / "checkpoint-2" / "fsdp").is_dir(), "it trained in one piece"
