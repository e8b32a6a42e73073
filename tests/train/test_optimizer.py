# SPDX-License-Identifier: Apache-2.0
"""Parameter groups: which learning rate and which decay a parameter gets, and that none is forgotten."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moellava.train.optimizer import missing_from, parameter_groups


@pytest.fixture
def model() -> nn.ModuleDict:
    """A projector, a linear with a norm behind it, and something frozen."""
    parts = {"projector": nn.Linear(2, 2), "layer": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "tower": nn.Linear(2, 2)}
    parts["tower"].requires_grad_(False)
    return nn.ModuleDict(parts)


def groups_of(model: nn.ModuleDict, **options: float) -> dict[str, tuple[float, float, set[str]]]:
    """Name of each group -> learning rate, decay, names of its parameters."""
    groups = parameter_groups(model, model["projector"], learning_rate=1e-3, **options)
    assert missing_from(groups, model) == []
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        group["name"]: (group["lr"], group["weight_decay"], {name_of[id(parameter)] for parameter in group["params"]})
        for group in groups
    }


def test_the_projector_has_a_rate_of_its_own_and_matrices_alone_decay(model):
    assert groups_of(model, weight_decay=0.1, projector_lr=1e-5) == {
        "projector_decay": (1e-5, 0.1, {"projector.weight"}),
        "projector_no_decay": (1e-5, 0.0, {"projector.bias"}),
        "model_decay": (1e-3, 0.1, {"layer.weight"}),
        "model_no_decay": (1e-3, 0.0, {"layer.bias", "norm.weight", "norm.bias"}),
    }


def test_without_a_rate_and_a_decay_there_is_one_group(model):
    every = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert groups_of(model, weight_decay=0.0) == {"model_no_decay": (1e-3, 0.0, every)}


def test_a_parameter_that_no_group_holds_is_named(model):
    groups = parameter_groups(model, model["projector"], learning_rate=1e-3, weight_decay=0.0)
    model["late"] = nn.ParameterList([torch.zeros(1)])
    assert missing_from(groups, model) == ["late.0"]
