# SPDX-License-Identifier: Apache-2.0
"""The estimate is the arithmetic of ZeRO, parameter by parameter."""

import json

import pytest
import torch
from torch import nn

from moellava.train.memory import describe, estimate, zero_stage


def half_frozen(dtype):
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)).to(dtype)
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("dtype", "zero", "expected"),
    [
        (torch.float32, 0, {"weights": 800, "gradients": 400, "optimizer": 800}),
        (torch.bfloat16, 0, {"weights": 400, "gradients": 200, "optimizer": 1200}),
        (torch.bfloat16, 1, {"weights": 400, "gradients": 200, "optimizer": 600}),
        (torch.bfloat16, 2, {"weights": 400, "gradients": 100, "optimizer": 600}),
        (torch.bfloat16, 3, {"weights": 200, "gradients": 100, "optimizer": 600}),
    ],
)
def test_bytes_of_one_of_two_processes(dtype, zero, expected):
    assert estimate(half_frozen(dtype), zero, processes=2) == expected


def test_the_stage_is_read_from_the_file(tmp_path):
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert zero_stage(str(tmp_path / "zero.json")) == 2
    assert zero_stage(None) == 0


def test_the_line_names_the_parts():
    assert describe({"weights": 2.5e9, "gradients": 5e5}) == (
        "Memory of each process without activations: 2.5 GB (weights 2.5 GB, gradients 0.5 MB)"
    )
