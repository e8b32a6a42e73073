# SPDX-License-Identifier: Apache-2.0
"""Which parts of a model a stage trains, by its flags."""

from __future__ import annotations

import pytest

from moellava.errors import UserError
from moellava.moe import MoESpec, upcycle
from moellava.train.arguments import ModelArguments, MoEArguments
from moellava.train.reconcile import retrain
from moellava.train.stages import FINETUNE, MOE, PRETRAIN, Stage, freeze_all_but, parameter_table
from moellava.vlm import VLM
from tests.tiny import compose_tiny

LANGUAGE_MODEL = {"language_model", "lm_head"}


@pytest.fixture(scope="module")
def dense(parts) -> VLM:
    """A composed model."""
    return compose_tiny(parts / "lm", parts / "tower", "qwen")


@pytest.fixture(scope="module")
def sparse(parts) -> VLM:
    """The same, upcycled."""
    vlm = compose_tiny(parts / "lm", parts / "tower", "qwen")
    vlm.sparse(MoESpec())
    upcycle(vlm.model, MoESpec())
    return vlm


def trained(vlm: VLM, stage: Stage, moe: MoEArguments | None = None, **flags: object) -> set[str]:
    """The parts that train; none of them in part."""
    freeze_all_but(vlm.model, stage.selects(vlm, ModelArguments(**flags), moe or MoEArguments()))
    rows = parameter_table(vlm)
    chosen = {part for part, row in rows.items() if row["trainable"]}
    assert not any(rows[part]["frozen"] for part in chosen)
    return chosen


def test_stage_1_trains_the_projector_alone(dense):
    assert trained(dense, PRETRAIN) == {"projector"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, LANGUAGE_MODEL | {"projector"}),
        ({"freeze_mm_mlp_adapter": True}, LANGUAGE_MODEL),
        ({"freeze_backbone": True}, {"projector"}),
        ({"train_vision_projector": False}, LANGUAGE_MODEL),
        ({"train_vision_encoder": True}, LANGUAGE_MODEL | {"projector", "vision_tower"}),
    ],
)
def test_stage_2_trains_all_but_the_tower_unless_a_flag_says_otherwise(dense, flags, expected):
    assert trained(dense, FINETUNE, **flags) == expected


def test_stage_2_that_freezes_everything_is_an_error(dense):
    with pytest.raises(UserError, match="Nothing would train"):
        trained(dense, FINETUNE, freeze_backbone=True, freeze_mm_mlp_adapter=True)


@pytest.mark.parametrize(
    ("moe", "flags", "expected"),
    [
        ({}, {}, {"experts", "routers"}),
        ({"freeze_router": True}, {}, {"experts"}),
        ({"train_modules": ["wg"]}, {}, {"routers"}),
        ({}, {"train_vision_projector": True}, {"experts", "routers", "projector"}),
        ({}, {"train_vision_encoder": True}, {"experts", "routers", "vision_tower"}),
    ],
)
def test_stage_3_trains_experts_and_routers_and_what_a_flag_names(sparse, moe, flags, expected):
    retrain(sparse, MoEArguments(**({"freeze_router": False} | moe)))
    assert trained(sparse, MOE, MoEArguments(**moe), **flags) == expected
