# SPDX-License-Identifier: Apache-2.0
"""Options: which layers, which values are refused, what config.json keeps."""

from __future__ import annotations

import pytest

from moellava.errors import UserError
from moellava.moe import MoESpec


@pytest.mark.parametrize(
    ("mode", "layers"),
    [("first_half", [0, 1]), ("second_half", [2, 3, 4]), ("sparse", [0, 2, 4]), ("dense", [0, 1, 2, 3, 4])],
)
def test_modes_choose_layers(mode, layers):
    assert list(MoESpec(moe_mode=mode).layers_of(5)) == layers


def test_indices_override_the_mode_and_counts_may_differ():
    spec = MoESpec(moe_layers_idx=[1, 3], num_experts=[2, 4])
    assert spec.layers_of(4) == {1: 2, 3: 4}
    assert spec.moe_mode == "custom"


def test_one_count_serves_all_layers():
    assert MoESpec(moe_mode="dense", num_experts=[3]).layers_of(2) == {0: 3, 1: 3}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"moe_mode": "third"}, "moe_mode"),
        ({"moe_mode": "custom"}, "--moe_layers_idx"),
        ({"top_k_experts": 5}, "--top_k_experts 5"),
        ({"top_k_experts": 0}, "--top_k_experts 0"),
        ({"num_experts": [0]}, "--num_experts"),
        ({"init": "clone"}, "--init 'clone'"),
        ({"granularity": 2}, "--init granular"),
        ({"init": "granular", "granularity": 3}, "not a multiple of --granularity 3"),
        ({"init": "granular", "granularity": 4, "num_experts": [8], "top_k_experts": 2}, "whole sets of slices"),
        ({"second_expert": "sampled", "top_k_experts": 1}, "--second_expert sampled"),
        ({"init_drop_ratio": 1.5}, "--init_drop_ratio"),
        ({"capacity_factor": 0.0}, "--capacity_factor"),
        ({"router_jitter": 1.0}, "--router_jitter"),
        ({"router_aux_loss_coef": -1.0}, "--router_aux_loss_coef"),
    ],
)
def test_bad_values_are_refused_by_name(values, message):
    with pytest.raises(UserError, match=message):
        MoESpec(**values)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (MoESpec(moe_layers_idx=[1, 9]), "0 … 3"),
        (MoESpec(moe_layers_idx=[1, 1]), "must differ"),
        (MoESpec(moe_mode="dense", num_experts=[2, 4]), "2 values, but 4 layers"),
    ],
)
def test_layers_that_do_not_fit_the_model(spec, message):
    with pytest.raises(UserError, match=message):
        spec.layers_of(4)


def test_config_section_round_trip():
    spec = MoESpec(moe_layers_idx=[0, 2], num_experts=[2, 4], router_z_loss_coef=0.1, use_residual=True)
    assert MoESpec.from_config(spec.to_config()) == spec


def test_published_sections_take_the_original_routing_and_loss():
    section = {"moe_enable": True, "moe_mode": "sparse", "moe_layers_idx": [0, 2], "num_experts": [4, 4]}
    section |= {"top_k_experts": 2, "capacity_factor": 1.5, "ep_size": 1, "train_modules": None}
    spec = MoESpec.from_config(section)
    assert (spec.router_balance, spec.aux_over_layers, spec.drop_tokens) == ("first_choice", "sum", True)
    assert (spec.second_expert, spec.capacity_factor) == ("sampled", 1.5)
    assert MoESpec.from_config({**section, "top_k_experts": 1}).top1_gate == "probability"


def test_presets_give_way_to_what_is_said():
    assert MoESpec.from_preset("moe-llava").capacity_factor == 1.5
    assert MoESpec.from_preset("moe-llava", capacity_factor=2.0).capacity_factor == 2.0


@pytest.mark.parametrize(
    ("values", "exact"),
    [
        ({}, True),
        ({"top_k_experts": 1}, True),
        ({"top_k_experts": 1, "top1_gate": "probability"}, False),
        ({"init": "noise"}, False),
        ({"init": "drop"}, False),
        ({"init": "drop", "init_drop_ratio": 0.0}, True),
        ({"init": "shared"}, True),
        ({"init": "granular", "granularity": 2}, True),
        ({"drop_tokens": True}, False),
    ],
)
def test_which_recipes_are_exact(values, exact):
    assert MoESpec(**values).is_exact() is exact
