# SPDX-License-Identifier: Apache-2.0
"""What ZeRO-3 has whole, told by a plan and by DeepSpeed itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moellava.plan.zero3 import Settings, Visit, usual, visits_of, whole_in_the_backward
from moellava.train.deepspeed.named import settings_named
from tests import tiny
from tests.processes import run_python, words_of

LAYERS = [{0: 100}, {}, {1: 10}, {}, {2: 10}, {}, {3: 10}, {}, {4: 10}, {}, {5: 50}]
"""Words, four layers with an activation behind each, a head: numbers of each module's parameters."""

STEP = [*(Visit(own, True) for own in LAYERS), *(Visit(own, False) for own in reversed(LAYERS))]


@pytest.mark.parametrize(
    ("prefetch", "live", "whole"),
    [
        (0, 1000, 100),  # nothing but what computes: the words, which come last
        (1000, 1000, 100),  # all is fetched ahead at once, its later use passed, and let go: words come last, alone
        (10, 1000, 170),  # the front is two layers ahead
        (10, 120, 170),  # the front holds the limit, and what computes comes on top
    ],
)
def test_what_is_whole_from_the_head_on(prefetch, live, whole):
    assert whole_in_the_backward(STEP, Settings(prefetch, persistent=0, live=live)) == whole


def test_small_parameters_stay():
    assert whole_in_the_backward(STEP, Settings(0, persistent=10)) == 140


def test_a_tower_that_rests_has_no_backward():
    model = tiny.tiny_llava()
    model.model.vision_tower.requires_grad_(False)
    visits, tower = visits_of(model), len(list(model.model.vision_tower.modules()))
    forward = [visit for visit in visits if visit.forward]
    assert len(forward) == len(list(model.modules())) and len(visits) == 2 * len(forward) - tower
    assert sum(sum(visit.own.values()) for visit in forward) == sum(p.numel() for p in model.parameters())


MEASURED = """
import sys
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator
from transformers import TrainerCallback
from moellava.train.parsing import parse_arguments
from moellava.train.train import StageTrainer, train
fetch, parameters, whole = Coordinator.fetch_sub_module, [], [[]]
def watched(self, module, forward):
    fetch(self, module, forward)
    there = (p for p in parameters if p.ds_status != ZeroParamStatus.NOT_AVAILABLE)
    whole[-1].append((forward, any(True for _ in module.parameters(recurse=False)), sum(p.ds_numel for p in there)))
Coordinator.fetch_sub_module = watched
class Steps(TrainerCallback):
    def on_train_begin(self, args, state, control, model, **kwargs):
        parameters.extend(model.parameters())
    def on_step_begin(self, *args, **kwargs):
        whole.append([])
made = StageTrainer.__init__
def with_steps(self, **kwargs):
    made(self, **kwargs)
    self.add_callback(Steps)
StageTrainer.__init__ = with_steps
train(*parse_arguments(sys.argv[1:]))
last = whole[-1]
turn = max(place for place, (forward, has_some, _) in enumerate(last) if forward and has_some)
print(max(count for _, _, count in last[turn:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("live", [1_000_000_000, 20_000, 40_000])
def test_deepspeed_has_as_much_whole_as_is_told(flags_for, tmp_path, live):
    """A model below and above the limit: 66,744 numbers, of which 51,296 train. The front stops to one parameter."""
    content = json.loads(Path(str(settings_named("zero3"))).read_text())
    content["zero_optimization"]["stage3_max_live_parameters"] = live
    (tmp_path / "zero3.json").write_text(json.dumps(content))
    flags = flags_for(tmp_path, "finetune") | {"max_steps": 4, "save_strategy": "no", "skip_dry_save": True}
    flags |= {"untrained_projector": True, "pretrain_mm_mlp_adapter": None, "deepspeed": tmp_path / "zero3.json"}
    found = int(run_python(MEASURED, *words_of(flags)).split()[-1])
    model = tiny.reopen(tmp_path / "finetune").model
    model.model.vision_tower.requires_grad_(False)
    usually = usual(model.config.text_config.hidden_size)
    told = whole_in_the_backward(visits_of(model), Settings(usually.prefetch, usually.persistent, live))
    assert abs(told - found) <= max(parameter.numel() for parameter in model.parameters())
