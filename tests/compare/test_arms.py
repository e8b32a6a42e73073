# SPDX-License-Identifier: Apache-2.0
"""Arms: which flags reach which, in which order they run, and for how long."""

from __future__ import annotations

import pytest

from moellava.compare.arms import (
    ARMS,
    DENSE,
    SPARSE,
    Costs,
    grouped,
    in_order,
    overridden,
    split_flags,
    variants,
    without,
)
from moellava.errors import UserError


def test_flags_of_a_sparse_model_are_for_it_alone():
    words = ["--learning_rate", "5e-4", "--num_experts", "2", "4", "--bf16", "--top-k-experts=2", "--ep_size", "2"]
    assert split_flags(words) == (
        ["--learning_rate", "5e-4", "--bf16"],
        ["--num_experts", "2", "4", "--top_k_experts", "2", "--ep_size", "2"],
    )


@pytest.mark.parametrize("flag", ["--output_dir", "--seed", "--model-name-or-path", "--moe_enable"])
def test_what_a_comparison_sets_itself_is_refused(flag):
    with pytest.raises(UserError, match="gives each run its own"):
        split_flags(["--learning_rate", "1", flag, "x"])


def test_a_value_without_a_flag_is_named():
    with pytest.raises(UserError, match="'5e-4' stands where a flag"):
        split_flags(["5e-4"])


def test_flags_leave_with_their_values():
    assert without(["--max_steps", "5", "--bf16", "--layers", "1", "2"], "--max_steps", "--layers") == ["--bf16"]
    assert grouped(["--a=b c", "--d-e"]) == [["--a", "b c"], ["--d_e"]]


def test_the_sparse_arm_and_its_control_come_first_and_always():
    assert list(in_order(["lora", "dense-time"])) == [SPARSE, DENSE, "dense-time", "lora"]
    with pytest.raises(UserError, match="no-such"):
        in_order(["no-such"])


def test_a_variant_is_an_arm_with_flags_in_place_of_others():
    found = variants([("noise", SPARSE, "--init noise --learning_rate 1e-3"), ("dense-fast", DENSE, "--max_steps 5")])
    assert list(found) == ["noise", "dense-fast"] and found["noise"].is_sparse and found["noise"].title == "noise"
    words = overridden(["--learning_rate", "5e-4", "--init", "copy", "--bf16"], found["noise"].flags)
    assert words == ["--bf16", "--learning_rate", "1e-3", "--init", "noise"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("moe", SPARSE, ""), "a name of its own"),
        (("stage2", SPARSE, ""), "a name of its own"),
        (("a/b", SPARSE, ""), "a name of its own"),
        (("..", SPARSE, ""), "a name of its own"),
        (("a", "no-such", ""), "no-such"),
        (("a", DENSE, "--init noise"), "--init is for a sparse model"),
        (("a", SPARSE, "--seed 3"), "gives each run its own"),
        (("a", SPARSE, "noise"), "stands where a flag"),
    ],
    ids=str,
)
def test_a_variant_that_cannot_be_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        variants([given])
    with pytest.raises(UserError, match="a name of its own"):
        variants([("a", SPARSE, ""), ("a", SPARSE, "")])


def test_controls_spend_what_the_sparse_arm_spends():
    costs = Costs(steps=100, flops={SPARSE: 3.0, DENSE: 2.0}, speed={SPARSE: 50.0, DENSE: 80.0})
    assert ARMS["dense-flops"].steps(costs) == 150
    assert ARMS["dense-time"].steps(costs) == 160
    assert ARMS[DENSE].steps(costs) is None


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.length])
def test_a_control_trains_a_step_at_least(name, caplog):
    costs = Costs(steps=2, flops={SPARSE: 1.0, DENSE: 9.0}, speed={SPARSE: 90.0, DENSE: 10.0})
    assert ARMS[name].steps(costs) == 1
    assert "one step is more than the 0.22" in caplog.text
