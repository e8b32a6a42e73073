# SPDX-License-Identifier: Apache-2.0
"""ZeRO: gradients are summed together; under ZeRO-3 a dense model trains, experts are refused by name."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, is_deepspeed_zero3_enabled

from moellava.errors import UserError
from moellava.train.arguments import parse_arguments
from moellava.train.deepspeed.named import names, settings_named
from moellava.train.deepspeed.zero import refuse_zero3_experts, settle_overlap, whole_parameters
from tests.processes import ROOT, free_port, run, words_of

COUNTING = """
import sys
from deepspeed import comm
from transformers import TrainerCallback, trainer
from moellava.train.parsing import parse_arguments
from moellava.train.train import train

sums, whole = [], comm.all_reduce
comm.all_reduce = lambda tensor, *args, **options: (sums.append(tensor.numel()), whole(tensor, *args, **options))[1]

class Told(TrainerCallback):
    def on_step_begin(self, *args, **options):
        sums.clear()

    def on_pre_optimizer_step(self, args, state, control, model, **options):
        print("SUMS", sum(parameter.requires_grad for parameter in model.parameters()), *sums)

trainer.DEFAULT_CALLBACKS.append(Told)
train(*parse_arguments(sys.argv[1:]))
"""
"""A run that tells how many parameters train, and how many numbers each sum over processes before a step had."""


@pytest.fixture
def zero3(monkeypatch):
    """The arguments of a ZeRO-3 run."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    flags = "--model_name_or_path lm --data_path d.json --output_dir out --deepspeed scripts/zero3.json"
    return parse_arguments(flags.split())[3]


def test_parameters_are_whole_while_a_model_is_put_together(zero3):
    assert is_deepspeed_zero3_enabled()
    with pytest.raises(RuntimeError), whole_parameters(zero3):
        assert not is_deepspeed_zero3_enabled()
        raise RuntimeError("an error in between")
    assert is_deepspeed_zero3_enabled()


@pytest.mark.parametrize("has_streams", [True, False])
@pytest.mark.parametrize("name", names())
def test_no_settings_leave_a_word_where_deepspeed_reads_a_truth(name, has_streams):
    config = HfTrainerDeepSpeedConfig(settings_named(name))
    settle_overlap(config, has_streams)
    assert config.get_value("zero_optimization.overlap_comm") in ({None} if name == "zero1" else {has_streams})


def test_overlap_that_is_asked_for_stays():
    config = HfTrainerDeepSpeedConfig({"zero_optimization": {"stage": 2, "overlap_comm": True}})
    settle_overlap(config, has_streams=False)
    assert config.get_value("zero_optimization.overlap_comm") is True


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_gradients_are_summed_together(name, flags_for, tmp_path):
    flags = flags_for(tmp_path, "finetune") | {"max_steps": 2, "save_strategy": "no", "skip_dry_save": True}
    flags |= {"untrained_projector": True, "deepspeed": name, "pretrain_mm_mlp_adapter": None}
    done = run([sys.executable, "-c", COUNTING, *words_of(flags)])
    assert done.returncode == 0, done.stderr[-3000:]
    told = [list(map(int, line.split()[1:])) for line in done.stdout.splitlines() if line.startswith("SUMS")]
    assert len(told) == 2
    for parameters, *sums in told:
        assert parameters > 20 and len([count for count in sums if count > 1]) == 1


def test_experts_are_refused():
    refuse_zero3_experts("scripts/zero3.json", moe_enable=False)
    refuse_zero3_experts("scripts/zero2.json", moe_enable=True)
    refuse_zero3_experts(None, moe_enable=True)
    with pytest.raises(UserError, match="zero3.json.*--moe_enable.*--deepspeed zero2"):
        refuse_zero3_experts("scripts/zero3.json", moe_enable=True)


@pytest.mark.slow
def test_two_processes_under_zero3_train_as_one(tmp_path, flags_for, run_train, losses_of):
    flags = flags_for(tmp_path, "finetune") | {"max_steps": 2, "save_strategy": "no", "untrained_projector": True}
    flags.pop("pretrain_mm_mlp_adapter")
    split = flags | {"output_dir": tmp_path / "split", "deepspeed": ROOT / "scripts" / "zero3.json"}
    whole = flags | {"output_dir": tmp_path / "whole", "per_device_train_batch_size": 4}
    for own, processes in ((split, 2), (whole, 1)):
        result = run_train(own, processes=processes)
        assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    assert losses_of(tmp_path / "split") == pytest.approx(losses_of(tmp_path / "whole"), abs=1e-4)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("split", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=1e-2) for name in one)


@pytest.mark.slow
def test_settings_that_do_not_count_may_change_on_the_way(tmp_path, flags_for, run_train, losses_of, begin_at):
    """A run of ZeRO-3 goes on with other buckets and limits to the same weights."""
    flags = flags_for(tmp_path, "finetune") | {"max_steps": 4, "save_total_limit": 3, "untrained_projector": True}
    flags |= {"pretrain_mm_mlp_adapter": None, "skip_dry_save": True}
    content = json.loads(Path(str(settings_named("zero3"))).read_text())
    content |= {"steps_per_print": 7}
    content["zero_optimization"] |= {
        **{"stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0},
        **{"stage3_max_live_parameters": 9_000, "stage3_max_reuse_distance": 0, "reduce_bucket_size": 20_000},
    }
    (tmp_path / "other.json").write_text(json.dumps(content))
    folders = {"zero3": tmp_path / "through", tmp_path / "other.json": tmp_path / "again"}
    for settings, folder in folders.items():
        if folder.name == "again":
            begin_at(2, tmp_path / "through", folder)
        result = run_train(flags | {"deepspeed": settings, "output_dir": folder}, processes=2)
        assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    assert losses_of(tmp_path / "again") == pytest.approx(losses_of(tmp_path / "through"), abs=1e-6)
    one, other = (load_file(folder / "model.safetensors") for folder in folders.values())
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
