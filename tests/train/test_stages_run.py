# SPDX-License-Identifier: Apache-2.0
"""The three stages in real processes: what trains, what is left behind, and that a killed run goes on unchanged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.processes import train_here
from tests.tiny import weights_of

STAGES = ("pretrain", "finetune", "moe")


@pytest.fixture(scope="module")
def single(tmp_path_factory, flags_for, run_train) -> Path:
    """The three stages, uninterrupted, in one fp32 process each."""
    runs = tmp_path_factory.mktemp("single")
    for stage in STAGES:
        result = run_train(flags_for(runs, stage))
        assert result.returncode == 0, result.stderr[-3000:]
    return runs


@pytest.fixture(scope="module")
def double(tmp_path_factory, flags_for, run_train) -> Path:
    """The three stages, uninterrupted, in two processes; stage 3 under the deepspeed launcher, with ep_size 2."""
    runs = tmp_path_factory.mktemp("double")
    for stage in STAGES:
        result = run_train(with_experts_split(flags_for(runs, stage)), processes=2, fresh=stage == "moe")
        assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    return runs


def with_experts_split(flags):
    return flags | {"ep_size": 2} if "moe_enable" in flags else flags


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["single", "double"])
def test_each_stage_trains_what_its_table_says_and_nothing_else(mode, request):
    runs = request.getfixturevalue(mode)
    pretrained, finetuned, sparse = (weights_of(runs / stage) for stage in STAGES)
    assert '"use_cache": false' not in (runs / "moe" / "config.json").read_text(), "generation would be slow"
    changed = {name for name in pretrained if not torch.equal(pretrained[name], finetuned[name])}
    assert not any("vision_tower" in name for name in changed)
    assert any("projector" in name for name in changed)
    assert any("layers.3.mlp" in name for name in changed)
    assert any("lm_head" in name for name in changed)
    kept = {name for name in finetuned if name in sparse}
    assert all(torch.equal(finetuned[name], sparse[name]) for name in kept), "stage 3 moved a dense parameter"
    assert {name for name in finetuned if name not in sparse} == {
        name for name in finetuned if "language_model.layers.0.mlp." in name or "language_model.layers.2.mlp." in name
    }
    tables = [json.loads((runs / stage / "parameters.json").read_text()) for stage in STAGES]
    assert [{part for part, row in table.items() if row["trainable"]} for table in tables] == [
        {"projector"},
        {"projector", "language_model", "lm_head"},
        {"experts", "routers"},
    ]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["single", "double"])
def test_a_stage_3_folder_holds_every_expert_and_they_differ(mode, request):
    sparse = weights_of(request.getfixturevalue(mode) / "moe")
    for layer in (0, 2):
        downs = [
            value for name, value in sorted(sparse.items()) if f"layers.{layer}.mlp.experts." in name and "down" in name
        ]
        assert len(downs) == 4
        assert all(not torch.equal(downs[0], other) for other in downs[1:]), "experts that were trained apart differ"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["single", "double"])
def test_the_log_shows_the_parts_of_the_loss_and_the_load(mode, request):
    history = json.loads((request.getfixturevalue(mode) / "moe" / "trainer_state.json").read_text())["log_history"]
    for entry in (entry for entry in history if "loss" in entry):
        assert entry["loss"] == pytest.approx(entry["ce"] + 0.01 * entry["aux"], rel=1e-4)
        assert entry["aux"] >= 0.9
        assert entry["tokens_per_second"] > 0
        for layer in (0, 2):
            load = [entry[f"expert_load/layer_{layer}/expert_{expert}"] for expert in range(4)]
            assert sum(load) == pytest.approx(1.0, abs=1e-3)


PLAIN = """
import json, sys
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration
from PIL import Image
image, *folders = sys.argv[1:]
found = []
for folder in folders:
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    text = "USER: <image>\\nwhat is in the image? ASSISTANT:"
    inputs = processor(images=Image.open(image), text=text, return_tensors="pt")
    found.append({"inputs": dict(inputs), "logits": model(**inputs).logits.detach()})
assert not any(name.startswith("moellava") for name in sys.modules)
torch.save(found, sys.stdout.buffer)
"""


@pytest.mark.slow
def test_dense_folders_open_in_plain_transformers(double, parts, tmp_path):
    """A process that never imports moellava computes the same logits, its processor the same inputs."""
    from moellava.model.builder import load_pretrained_model

    folders = [str(double / stage) for stage in ("pretrain", "finetune")]
    script = [sys.executable, "-c", PLAIN, str(parts / "images" / "1.png"), *folders]
    with (tmp_path / "plain.pt").open("wb") as file:
        subprocess.run(script, check=True, stdout=file, cwd=tmp_path)
    for folder, plain in zip(folders, torch.load(tmp_path / "plain.pt"), strict=True):
        _, model, _, _ = load_pretrained_model(folder, device="cpu", dtype=torch.float32)
        with torch.no_grad():
            logits = model(**plain["inputs"]).logits
        torch.testing.assert_close(logits, plain["logits"], atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_goes_on_to_exactly_the_same_losses(
    stage, single, tmp_path, flags_for, kill_train, losses_of, caplog
):
    """One fp32 process, killed with SIGKILL after step 2 or 4; the same flags go on in another process, this one."""
    flags = flags_for(single, stage) | {"output_dir": tmp_path / stage}
    kill_train(flags, "checkpoint-4" if stage == "finetune" else "checkpoint-2")
    with caplog.at_level("INFO"):
        train_here(flags)
    assert "Going on from" in caplog.text
    assert losses_of(tmp_path / stage) == losses_of(single / stage)
    mine, reference = weights_of(tmp_path / stage), weights_of(single / stage)
    assert mine.keys() == reference.keys()
    assert all(torch.equal(mine[name], reference[name]) for name in mine)


@pytest.mark.slow
def test_a_killed_run_of_two_processes_goes_on(double, tmp_path, flags_for, kill_train, run_train, losses_of):
    stage = "moe"
    flags = with_experts_split(flags_for(double, stage)) | {"output_dir": tmp_path / stage}
    kill_train(flags, "checkpoint-2", processes=2)
    result = run_train(flags, processes=2)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    assert losses_of(tmp_path / stage) == pytest.approx(losses_of(double / stage), abs=1e-5)
    mine, reference = weights_of(tmp_path / stage), weights_of(double / stage)
    assert all(torch.allclose(mine[name], reference[name], atol=1e-5) for name in reference)


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(single, flags_for, caplog):
    before = (single / "pretrain" / "model.safetensors").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        train_here(flags_for(single, "pretrain"))
    assert "has finished before" in caplog.text
    assert (single / "pretrain" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["finetune", "moe"])
def test_two_processes_train_as_one_with_twice_the_batch(stage, double, tmp_path, flags_for, run_train, losses_of):
    """DeepSpeed with experts split over two ranks against the native engine in one process: the same numbers."""
    flags = flags_for(double, stage) | {"output_dir": tmp_path / stage, "per_device_train_batch_size": 4}
    result = run_train(flags)
    assert result.returncode == 0, result.stderr[-3000:]
    assert losses_of(tmp_path / stage) == pytest.approx(losses_of(double / stage), abs=1e-4)


@pytest.mark.slow
def test_accumulated_batches_train_as_one_batch(single, tmp_path, flags_for, run_train, losses_of):
    """Cross-entropy and router losses are means over the step, however its samples are split."""
    whole, split = (
        flags_for(single, "moe") | {"output_dir": tmp_path / name, "router_z_loss_coef": 0.1}
        for name in ("whole", "split")
    )
    assert run_train(whole | {"per_device_train_batch_size": 4}).returncode == 0
    assert run_train(split | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}).returncode == 0
    assert losses_of(tmp_path / "split") == pytest.approx(losses_of(tmp_path / "whole"), abs=1e-4)


@pytest.mark.slow
def test_torchrun_evaluation_checkpointing_and_tensorboard(double, tmp_path, flags_for, run_train, losses_of):
    """Data parallel with all experts in each process: DeepSpeed's numbers, with recomputation and evaluation."""
    flags = flags_for(double, "moe") | {
        "output_dir": tmp_path / "moe",
        "gradient_checkpointing": True,
        "eval_data_path": flags_for(double, "moe")["data_path"],
        "eval_strategy": "steps",
        "eval_steps": 3,
        "report_to": "tensorboard",
    }
    result = run_train(flags, processes=2, launcher="torchrun", fresh=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert losses_of(tmp_path / "moe") == pytest.approx(losses_of(double / "moe"), abs=1e-4)
    history = json.loads((tmp_path / "moe" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [3, 6]
    for entry in (entry for entry in history if "loss" in entry):
        assert entry["loss"] == pytest.approx(entry["ce"] + 0.01 * entry["aux"], rel=1e-4)
    assert {"train/ce", "train/aux", "train/expert_load/layer_0/expert_0"} <= tensorboard_tags(tmp_path / "moe")


def tensorboard_tags(folder: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = folder.rglob("events.out.tfevents*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    return set(accumulator.Tags()["scalars"])


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2])
def test_a_run_goes_on_with_another_ep_size(first, double, tmp_path, flags_for, kill_train, run_train, losses_of):
    """Experts and their optimizer states move from one split over processes to the other; both end in one model."""
    flags = flags_for(double, "moe") | {"output_dir": tmp_path / "moe"}
    kill_train(flags | {"ep_size": first}, "checkpoint-4", processes=2)
    result = run_train(flags | {"ep_size": 3 - first}, processes=2)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    assert f"was written with --ep_size {first}" in result.stderr + result.stdout
    assert losses_of(tmp_path / "moe") == pytest.approx(losses_of(double / "moe"), abs=1e-5)
    mine, reference = weights_of(tmp_path / "moe"), weights_of(double / "moe")
    assert mine.keys() == reference.keys()
    assert all(torch.allclose(mine[name], reference[name], atol=1e-5) for name in reference)
