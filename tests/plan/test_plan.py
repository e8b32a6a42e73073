# SPDX-License-Identifier: Apache-2.0
"""Which ways are looked at, what each holds, and which one is taken."""

from dataclasses import replace

import pytest
import torch

from moellava.plan.devices import DEVICES
from moellava.plan.plan import Asked, Held, Row, cheapest, held_by, layouts_for, moved_seconds, row_of, rows_of
from moellava.plan.report import best_of_each, called, flags_of, launcher, table
from moellava.plan.samples import Sample, Samples
from moellava.plan.trace import Traced
from moellava.plan.zero3 import usual, visits_of, whole_in_the_backward
from moellava.train.memory import Layout
from moellava.vlm import VLM
from tests.plan.test_trace import model
from tests.tiny import tiny_llava

ROW = Row(Layout(4, zero=2), 2, False, {"weights": 6e9, "activations": 1e9}, 100.0, 80.0)


MANY = Samples((Sample((10**5,), 8),))


def test_expert_parallel_sizes_divide_processes_and_experts_and_zero3_holds_no_experts():
    sparse = layouts_for(4, [4, 2], is_moe=True)
    assert {layout.ep_size for layout in sparse} == {1, 2}
    assert all(layout.deepspeed and layout.zero in (1, 2) for layout in sparse)
    dense = layouts_for(4, None, is_moe=False)
    assert {(layout.deepspeed, layout.zero, layout.offload, layout.fsdp) for layout in dense} == {
        (False, 0, False, 1),
        (False, 0, False, 4),
        (True, 1, False, 1),
        (True, 2, False, 1),
        (True, 2, True, 1),
        (True, 3, False, 1),
    }
    assert any(not layout.deepspeed for layout in layouts_for(1, [4], is_moe=True))


@pytest.mark.parametrize(("is_gpu", "buffers"), [(True, {1: 1, 2: 2, 3: 1}), (False, {1: 0, 2: 0, 3: 1})])
def test_gradients_are_summed_in_buffers_of_the_packages_settings(is_gpu, buffers):
    by_stage = {layout.zero: layout for layout in layouts_for(2, None, is_moe=False, is_gpu=is_gpu)}
    vlm = VLM(model(False, "meta"), None, None, None)
    told = {zero: held_by(vlm, by_stage[zero]).fixed["buckets"] for zero in buffers}
    assert told == {zero: count * 4 * 12_500_000 for zero, count in buffers.items()}
    assert held_by(vlm, Layout(2, zero=2)).fixed["buckets"] == 4 * vlm.model.config.get_text_config().hidden_size ** 2


def test_own_experts_are_spread_over_those_that_hold_one_copy():
    split = [layout for layout in layouts_for(16, None, False, own_counts=[12], per_host=8) if layout.fsdp > 1]
    assert {(layout.fsdp, layout.ep_size) for layout in split} == {
        *((8, size) for size in (1, 2, 4)),
        *((16, size) for size in (1, 2, 4)),
    }
    assert not any(layout.deepspeed for layout in split)
    assert {layout.fsdp for layout in layouts_for(12, None, False, per_host=8)} == {1, 12}


def test_the_cheapest_is_the_fastest_that_fits_and_of_equals_the_simplest():
    fast, small = replace(ROW, flops_bound=200.0, bandwidth_bound=200.0), replace(ROW, memory={"weights": 1e9})
    assert cheapest([ROW, fast, small], 8) is fast
    assert cheapest([fast, small], 2) is small
    assert cheapest([ROW], 6) is None
    split = replace(ROW, layout=Layout(4, zero=2, ep_size=2))
    assert cheapest([split, ROW], 8) is ROW
    assert cheapest([replace(ROW, samples=0)], 80) is None


def asked(layouts, **others) -> Asked:
    device = DEVICES["cpu"]
    return Asked(len(layouts), 1.0, device, 8, Samples((Sample((32,), 8),)), layouts, (1, 2, 3), (False,), **others)


@pytest.mark.slow
def test_a_line_through_two_numbers_of_samples_says_the_third():
    def make(ep_size: int) -> VLM:
        return VLM(model(False, "meta"), None, None, None)

    layout = Layout(1, deepspeed=False)
    told = {row.samples: row for row in rows_of(asked((layout,)), make)}
    alone = rows_of(replace(asked((layout,)), samples=(3,)), make)[0]
    assert told[3].total == pytest.approx(alone.total, rel=0.02)
    assert told[3].flops_bound == pytest.approx(alone.flops_bound, rel=0.02)
    assert rows_of(replace(asked((layout,)), memory=1e-6), make)[0].samples == 0


def test_rows_that_travel_take_time_on_the_link():
    held = Held({"optimizer": 0.0}, 1e6, 1e6, 1.0, 1e6, 2)
    layouts = [Layout(2, zero=2, ep_size=size) for size in (1, 2)]
    alone, spread = (
        moved_seconds(replace(asked(tuple(layouts)), data=MANY), layout, held, 1, False, Traced(0, 0, 1))
        for layout in layouts
    )
    assert spread > 10 * alone


def sparse_vlm(ep_size: int = 1) -> VLM:
    """One that is sparse of itself, all of it trained; `ep_size` is not read."""
    experts = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    with torch.device("meta"):
        return VLM(tiny_llava("qwen2_moe", **experts), None, None, None)


def test_a_split_model_is_gathered_by_layers_and_a_process_gathers_its_own_experts():
    vlm = sparse_vlm()
    layer, language_model = vlm.model.get_decoder().layers[0], vlm.model.get_decoder()
    numbers = lambda module: sum(parameter.numel() for parameter in module.parameters())  # noqa: E731
    outer = numbers(vlm.model) - sum(map(numbers, language_model.layers)) - numbers(language_model.embed_tokens)
    for ep_size in (1, 2, 4):
        held = held_by(vlm, Layout(4, deepspeed=False, fsdp=4, ep_size=ep_size))
        own = numbers(layer) - numbers(layer.mlp.experts) * (1 - 1 / ep_size)
        assert held.fixed["gathered"] == 4 * (2 * own + outer) + 4 * outer + 8 * own
        assert held.fixed["weights"] == held.fixed["gradients"] == numbers(vlm.model)  # 4 bytes each, in 4 pieces
        assert held.fixed["optimizer"] == 2 * numbers(vlm.model)
        assert held.rows == (0 if ep_size == 1 else 4 * 4 * 32 * 4)  # layers, choices, hidden numbers, bytes


def test_zero3_has_whole_what_its_rules_leave_and_copies_a_gradient():
    layout, model = Layout(2, zero=3), sparse_vlm().model
    vlm = VLM(model.to(torch.bfloat16), None, None, None)
    row = row_of(asked((layout,) * 2), layout, held_by(vlm, layout), 1, False, Traced(0, 0, 1))
    numbers = [parameter.numel() for parameter in model.parameters()]
    whole = whole_in_the_backward(visits_of(model), usual(model.config.text_config.hidden_size))
    assert row.memory["gathered"] == 2 * whole + 2 * 2 * max(numbers)
    assert model.lm_head.weight.numel() < whole < sum(numbers)


def test_spread_experts_are_not_fetched_and_their_rows_travel():
    layouts = [Layout(4, deepspeed=False, fsdp=4, ep_size=size) for size in (1, 4)]
    held = [held_by(sparse_vlm(), layout) for layout in layouts]
    question = replace(asked(tuple(layouts)), device=replace(DEVICES["cpu"], bandwidth=1e9, link=1.0))
    both = list(zip(layouts, held, strict=True))
    few, many = (
        [moved_seconds(replace(question, data=data), *one, 1, False, Traced(0, 0, 1)) for one in both]
        for data in (Samples((Sample((1,), 1),)), MANY)
    )
    assert few[0] > few[1] and many[0] < many[1]


def test_a_row_says_its_flags_and_the_table_every_layout_once():
    row = replace(ROW, layout=Layout(4, zero=2, ep_size=4, offload=True), checkpointing=True)
    assert " ".join(flags_of(row)) == (
        "--per_device_train_batch_size 2 --deepspeed zero2_offload --ep_size 4 --activation_checkpointing True"
    )
    assert flags_of(replace(ROW, layout=Layout(1, deepspeed=False))) == ["--per_device_train_batch_size", "2"]
    split = Layout(16, deepspeed=False, fsdp=8, ep_size=4)
    assert " ".join(flags_of(replace(ROW, layout=split))).endswith("--fsdp_size 8 --ep_size 4")
    assert called(split) == "FSDP2 of 8" and called(replace(split, processes=8)) == "FSDP2"
    shown = best_of_each([ROW, replace(ROW, samples=1, flops_bound=1.0), row], 8)
    assert [(one.layout.ep_size, one.samples) for one in shown] == [(1, 2), (4, 2)]
    assert len(table(shown, 8)) == 3 and "ZeRO-2 offload" in table(shown, 8)[2]


def test_one_process_needs_no_launcher_and_several_hosts_are_started_as_such():
    assert launcher(1, 8) == "python"
    assert launcher(4, 8) == "torchrun --nproc-per-node 4"
    assert launcher(16, 8).startswith("torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend")
