# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's own files, read by parameter: as three ranks would have written them."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.utils.tensor_fragment import fragment_address

from moellava.errors import UserError
from moellava.train.deepspeed.portable import ELEMENTWISE, refuse_unreadable
from moellava.train.deepspeed.shards import EngineStates
from moellava.train.intact import reading

SHAPES = OrderedDict({"a": torch.Size([2, 2]), "b": torch.Size([5]), "c": torch.Size([1])})
WHOLE = {name: torch.arange(shape.numel()) + 10.0 * place for place, (name, shape) in enumerate(SHAPES.items())}
RANKS = 3


def put(folder, name, content):
    (folder / "global_step7").mkdir(exist_ok=True)
    torch.save(content, folder / "global_step7" / name)


def states_of(flat):
    return {0: {"step": torch.tensor(7.0), "exp_avg": flat + 100, "exp_avg_sq": flat + 200}}


def write_stretches(folder):
    """Ten numbers of three parameters, four a rank, the last ones padding that DeepSpeed leaves out."""
    flat = torch.cat(list(WHOLE.values()))
    ends = torch.tensor([0, *(len(value) for value in WHOLE.values())]).cumsum(0).tolist()
    for rank in range(RANKS):
        begin, end = 4 * rank, min(4 * rank + 4, len(flat))
        placed = {}
        for name, first, last in zip(WHOLE, ends, ends[1:], strict=False):
            start, stop = max(first, begin), min(last, end)
            if start < stop:
                placed[name] = fragment_address(numel=stop - start, start=start - begin)
        optimizer = {
            "loss_scaler": LossScaler(1),
            "base_optimizer_state": {"state": states_of(flat[begin:end]), "param_groups": []},
            "single_partition_of_fp32_groups": [flat[begin:end]],
            "param_slice_mappings": [OrderedDict(placed)],
        }
        put(folder, f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", {"optimizer_state_dict": optimizer})


def write_parts(folder):
    """Each parameter in three parts, padded to one length."""
    for rank in range(RANKS):
        parts = []
        for value in WHOLE.values():
            size = -(-len(value) // RANKS)
            part = value[rank * size : (rank + 1) * size]
            parts.append(torch.cat([part, torch.full((size - len(part),), -1.0)]))
        flat = torch.cat(parts)
        optimizer = {
            "loss_scaler": LossScaler(1),
            "fp32_flat_groups": [flat],
            "optimizer_state_dict": {"state": states_of(flat), "param_groups": []},
        }
        put(folder, f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", {"optimizer_state_dict": optimizer})
        put(folder, f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", {"param_shapes": [SHAPES]})


@pytest.mark.parametrize("write", [write_stretches, write_parts])
def test_every_state_is_read_by_parameter(write, tmp_path):
    write(tmp_path)
    with reading(tmp_path, with_deepspeed=True):
        stored = EngineStates(tmp_path)
        assert (stored.step, stored.moments) == (7, ["exp_avg", "exp_avg_sq"])
        for name, value in WHOLE.items():
            for key, more in {"fp32": 0, "exp_avg": 100, "exp_avg_sq": 200}.items():
                assert torch.equal(stored.read(f"{name}::{key}", 0, len(value)), value + more)
        assert stored.read("b::fp32", 1, 3).tolist() == [11, 12, 13]
        with pytest.raises(UserError, match="holds no b::fp32: the checkpoint is of another model or stage"):
            stored.read("b::fp32", 3, 3)


def test_files_that_hold_something_else_are_refused(tmp_path):
    for content in (None, {"optimizer_state_dict": {"clip_grad": 0.0}}):
        if content is not None:
            put(tmp_path, "zero_pp_rank_0_mp_rank_00_optim_states.pt", content)
        with pytest.raises(UserError, match="could be read by parameter: go on with as many processes"):
            EngineStates(tmp_path)


def run_with(**options):
    """Arguments of one process."""
    usual = {"world_size": 1, "optim": "adamw_torch", "deepspeed": {"zero_optimization": {"stage": 2}}}
    return SimpleNamespace(**usual | options)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"optim": "adamw_8bit"}, "--optim adamw_8bit"),
        ({"optim": "adafactor"}, "--optim adafactor"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}}, "an optimizer of its own"),
        ({"deepspeed": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}}, "NVMe"),
    ],
)
def test_states_that_cannot_be_dealt_out_anew_are_named(options, named, tmp_path):
    for rank in range(2):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    with pytest.raises(UserError, match=f"by 2 processes, and now there are 1: .*{named}.*Go on with 2"):
        refuse_unreadable(run_with(**options), tmp_path)
    refuse_unreadable(run_with(**options, world_size=2), tmp_path)
    for optim in ELEMENTWISE:
        refuse_unreadable(run_with(optim=optim), tmp_path)
    refuse_unreadable(run_with(optim="adamw_8bit", deepspeed=None), tmp_path)
