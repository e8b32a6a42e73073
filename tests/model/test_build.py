# SPDX-License-Identifier: Apache-2.0
"""Weights into models: what is missing, left over or misshapen is an error, whatever the folder."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moellava.errors import UserError
from tests.tiny import compose_tiny, reopen


@pytest.fixture(scope="module")
def made(make_base, clip_tower):
    return compose_tiny(make_base("llama").folder, clip_tower, "plain", image_projector_type="mlp2x_gelu")


@pytest.fixture
def folder(made, tmp_path):
    path = tmp_path / "model"
    made.save(path, meta={"stage": "pretrain"})
    return path


def edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_missing_unexpected_and_misshapen_weights_are_errors(folder):
    weights = folder / "model.safetensors"
    state = load_file(weights)
    save_file({name: tensor for name, tensor in state.items() if "layers.2.mlp" not in name}, weights)
    with pytest.raises(UserError, match=r"missing: model.language_model.layers.2.mlp.down_proj"):
        reopen(folder)
    save_file({**state, "model.surplus": torch.zeros(1)}, weights)
    with pytest.raises(UserError, match="unexpected: model.surplus"):
        reopen(folder)
    save_file(state, weights)
    edit(folder, lambda config: config["text_config"].update(intermediate_size=40))
    with pytest.raises(UserError, match=r"\(48, 32\), but its config says \(40, 32\)"):
        reopen(folder)


def test_a_config_that_does_not_belong_to_the_projector_is_refused(folder):
    edit(folder, lambda config: config["moellava"].update(image_projector_type="linear"))
    with pytest.raises(UserError, match="linear_2 is not the identity"):
        reopen(folder)


def test_another_class_of_models_is_named(folder):
    edit(folder, lambda config: config.update(model_type="paligemma"))
    with pytest.raises(UserError, match="'paligemma' model, which no stage of ours writes"):
        reopen(folder)
