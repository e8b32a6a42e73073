# SPDX-License-Identifier: Apache-2.0
"""The estimate is the arithmetic of ZeRO, parameter by parameter."""

import json

import pytest
import torch
from torch import nn

from moellava.moe import MoESpec, routed_expert_parameters, upcycle
from moellava.train.memory import Layout, describe, estimate, layout_of, zero_stage
from tests.tiny import tiny_llava


def half_frozen(dtype):
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)).to(dtype)
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("dtype", "zero", "expected"),
    [
        (torch.float32, 0, {"weights": 800, "gradients": 400, "optimizer": 800}),
        (torch.float32, 2, {"weights": 800, "gradients": 200, "optimizer": 600}),
        (torch.bfloat16, 0, {"weights": 400, "gradients": 200, "optimizer": 1200}),
        (torch.bfloat16, 1, {"weights": 400, "gradients": 200, "optimizer": 600}),
        (torch.bfloat16, 2, {"weights": 400, "gradients": 100, "optimizer": 600}),
        (torch.bfloat16, 3, {"weights": 200, "gradients": 100, "optimizer": 600}),
    ],
)
def test_bytes_of_one_of_two_processes(dtype, zero, expected):
    assert estimate(half_frozen(dtype), Layout(2, zero=zero)) == expected


@pytest.mark.parametrize(
    ("dtype", "processes", "expected"),
    [
        (torch.float32, 1, {"weights": 800, "gradients": 400, "optimizer": 800}),
        (torch.float32, 2, {"weights": 800, "gradients": 800, "optimizer": 800}),
        (torch.bfloat16, 1, {"weights": 800, "gradients": 400, "optimizer": 800}),
    ],
)
def test_without_deepspeed_what_trains_is_fp32_and_summed_as_a_copy(dtype, processes, expected):
    assert estimate(half_frozen(dtype), Layout(processes, deepspeed=False)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fsdp2_splits_everything_over_those_that_hold_one_copy(dtype):
    frozen = 400 if dtype == torch.float32 else 200
    expected = {"weights": (frozen + 400) / 2, "gradients": 200, "optimizer": 400}
    assert estimate(half_frozen(dtype), Layout(4, deepspeed=False, fsdp=2)) == expected


def test_experts_are_split_over_those_who_hold_the_same():
    sparse = upcycle(tiny_llava(), MoESpec(num_experts=[4], moe_mode="dense"))
    for parameter in sparse.parameters():
        parameter.requires_grad_(False)
    experts = routed_expert_parameters(sparse)
    for parameter in experts:
        parameter.requires_grad_(True)
    numbers, rest = sum(p.numel() for p in experts), sum(p.numel() for p in sparse.parameters())
    rest -= numbers
    held = estimate(sparse, Layout(4, zero=2, ep_size=2))
    assert held == {"weights": 4 * (rest + numbers), "gradients": 4 * numbers / 2, "optimizer": 12 * numbers / 2}


def test_a_layout_is_read_from_the_file():
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert layout_of(offload, 4, 2) == Layout(4, zero=2, ep_size=2, offload=True, bucket=500_000_000)
    assert layout_of(None, 2) == Layout(2, deepspeed=False)
    assert layout_of(None, 4, fsdp=2) == Layout(4, deepspeed=False, fsdp=2)


@pytest.mark.parametrize(
    ("zero", "is_gpu", "bucket", "buffers"),
    [
        ({"stage": 2, "reduce_bucket_size": "auto"}, True, 0, 1),
        ({"stage": 2, "reduce_bucket_size": 1e6, "overlap_comm": True}, True, 1_000_000, 2),
        ({"stage": 2, "reduce_bucket_size": 7, "overlap_comm": "auto"}, True, 7, 2),
        ({"stage": 2, "reduce_bucket_size": 7, "overlap_comm": "auto"}, False, 7, 0),
        ({"stage": 2, "reduce_bucket_size": 7, "contiguous_gradients": False}, True, 7, 0),
        ({"stage": 3, "reduce_bucket_size": 7, "overlap_comm": "auto"}, False, 7, 1),
        ({"stage": 0}, True, 500_000_000, 0),
    ],
)
def test_buffers_of_gradients_are_those_of_the_file(zero, is_gpu, bucket, buffers):
    layout = layout_of({"zero_optimization": zero}, 2, is_gpu=is_gpu)
    assert (layout.bucket, layout.buffers) == (bucket, buffers)


def test_the_stage_is_read_from_the_file(tmp_path):
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert zero_stage(str(tmp_path / "zero.json")) == 2
    assert zero_stage(None) == 0


def test_the_line_names_the_parts():
    assert describe({"weights": 2.5e9, "gradients": 5e5}) == (
        "Memory of each process without activations: 2.5 GB (weights 2.5 GB, gradients 0.5 MB)"
    )
