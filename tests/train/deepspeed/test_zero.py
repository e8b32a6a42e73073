# SPDX-License-Identifier: Apache-2.0
"""ZeRO-3: a dense model is put together whole and trains; experts are refused by name."""

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from moellava.errors import UserError
from moellava.train.arguments import parse_arguments
from moellava.train.deepspeed.zero import refuse_zero3_experts, whole_parameters
from tests.processes import ROOT, free_port


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
    for run, processes in ((split, 2), (whole, 1)):
        result = run_train(run, processes=processes)
        assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    assert losses_of(tmp_path / "split") == pytest.approx(losses_of(tmp_path / "whole"), abs=1e-4)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("split", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=1e-2) for name in one)
