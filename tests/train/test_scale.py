# SPDX-License-Identifier: Apache-2.0
"""Sizes at which a run would break if a process held what belongs to others."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moellava.errors import UserError
from moellava.train.assemble import leave_files
from moellava.train.folder import compare_saved
from tests.older import SHARDS
from tests.processes import run_python
from tests.tiny import tiny_llava

OWN_EXPERTS = """
import resource, sys
from pathlib import Path
import deepspeed
import moellava.moe.deepspeed as engine
from moellava.moe import MoESpec, convert_engine, separate_experts
from moellava.moe.certificate import upcycle_certified
from tests.tiny import batch_for, tiny_llava
engine.rank, engine.world_size = lambda: 5, lambda: 8
model = tiny_llava(hidden_size=256, intermediate_size=1024, num_hidden_layers=8)
probes = {"text": batch_for(model)}
upcycle_certified(tiny_llava(), MoESpec(num_experts=[2]), {"text": batch_for(tiny_llava())})  # imports, buffers
held = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (held + 200_000_000,) * 2)
upcycle_certified(model, MoESpec(num_experts=[16], moe_mode="dense"), probes, share_copies=sys.argv[1] == "shared")
convert_engine(model, "deepspeed", ep_size=8)
separate_experts(model)
print("fits")
"""


@pytest.mark.slow
def test_a_process_that_holds_two_of_sixteen_experts_fits_into_memory_for_those():
    """All sixteen would take 400 MB, its own 50 MB; the limit leaves 200 MB."""
    assert run_python(OWN_EXPERTS, "shared").split()[-1] == "fits"
    with pytest.raises(AssertionError, match="allocate|memory"):
        run_python(OWN_EXPERTS, "each its own")


OWN_SHARE = """
import resource, sys
from pathlib import Path
from types import SimpleNamespace
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from moellava.files import read_json
from moellava.model.build import open_config, read
from moellava.model.stored import as_stored
from moellava.train import train
from moellava.train.fsdp import own
dist.init_process_group("fake", rank=3, world_size=8, store=FakeStore())
folder, run = Path(sys.argv[1]), getattr(torch, sys.argv[3])
in_16_bits = run == torch.bfloat16
args = SimpleNamespace(deepspeed=None, bf16=in_16_bits, fp16=False, fsdp_size=8, world_size=8)
args.device = torch.device("cpu")
def trained(folder):
    with as_stored(sys.argv[2] == "share"):
        model = read(folder, open_config(folder, read_json(folder / "config.json")), run)
    train.laid_out(SimpleNamespace(model=model, source="this model"), 1, args)
    return model
trained(folder / "small")  # imports, buffers
held = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
mapped = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
resource.setrlimit(resource.RLIMIT_DATA, (held + mapped + 100_000_000,) * 2)
model = trained(folder)
assert all(own(parameter).dtype == torch.float32 for parameter in model.parameters())
print("fits")
"""


@pytest.fixture(scope="module")
def stored_in(tmp_path_factory) -> Callable[[str], Path]:
    """Name of a dtype -> the folder of a model in it, 100 million parameters."""

    @cache
    def folder_in(dtype: str) -> Path:
        folder, sizes = tmp_path_factory.mktemp(dtype), {"hidden_size": 1024, "intermediate_size": 4096}
        tiny_llava(num_hidden_layers=6, **sizes).to(getattr(torch, dtype)).save_pretrained(folder)
        tiny_llava().save_pretrained(folder / "small")
        return folder

    return folder_in


@SHARDS
@pytest.mark.slow
@pytest.mark.parametrize("run", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_a_process_that_holds_an_eighth_reads_and_casts_no_more(stored_in, stored, run):
    """Its share is 50 MB in fp32, of a folder of 200 or 400 MB. The limit leaves 100 MB beside the mapped folder, which
    takes no memory by itself; Hugging Face's own cast, while it loads, takes 200 or 400."""
    assert run_python(OWN_SHARE, stored_in(stored), "share", run).split()[-1] == "fits"
    if stored != run:
        with pytest.raises(AssertionError, match="allocate|memory"):
            run_python(OWN_SHARE, stored_in(stored), "whole", run)


def test_a_dry_save_is_compared_tensor_by_tensor(tmp_path):
    state = {"a": torch.arange(4.0), "b": torch.ones(2)}
    for name, value in state.items():
        save_file({name: value}, tmp_path / f"{name}.safetensors")
    files = sorted(tmp_path.iterdir())
    compare_saved(files, state | {"tied": state["a"]})
    with pytest.raises(UserError, match="changed b"):
        compare_saved(files, state | {"b": torch.zeros(2)})
    with pytest.raises(UserError, match="lost 1 tensors: c"):
        compare_saved(files, state | {"c": torch.zeros(2)})


def test_no_frozen_tensor_keeps_the_file_of_all_mapped(tmp_path):
    save_file({"0.weight": torch.ones(3, 3), "1.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3, bias=False) for _ in range(2)))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        model.load_state_dict({name: file.get_tensor(name) for name in ("0.weight", "1.weight")}, assign=True)
    model[1].weight.requires_grad_(False)
    mapped = lambda: str(tmp_path / "model.safetensors") in Path("/proc/self/maps").read_text()  # noqa: E731
    assert mapped()
    leave_files(model)
    assert not mapped() and [parameter.requires_grad for parameter in model.parameters()] == [True, False]
    assert torch.equal(model[0].weight, torch.ones(3, 3)) and torch.equal(model[1].weight, torch.zeros(3, 3))
