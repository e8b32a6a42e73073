# SPDX-License-Identifier: Apache-2.0
"""Checkpoints appear whole or not at all, and a folder belongs to one run."""

import json

import pytest

from moellava.errors import UserError
from moellava.train.checkpoint import (
    STAGING,
    check_folder,
    claim_folder,
    complete_checkpoints,
    last_checkpoint,
    mark_finished,
    put_in_place,
)


def stage_checkpoint(output_dir, step):
    staged = output_dir / STAGING / f"checkpoint-{step}"
    staged.mkdir(parents=True)
    (staged / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return staged


def test_publish_orders_by_number_and_keeps_the_newest(tmp_path):
    for step in (2, 10, 9):
        put_in_place(stage_checkpoint(tmp_path, step), tmp_path, keep=None)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    put_in_place(stage_checkpoint(tmp_path, 11), tmp_path, keep=2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11"]


def test_a_half_written_checkpoint_is_never_the_last_one(tmp_path):
    put_in_place(stage_checkpoint(tmp_path, 1), tmp_path, keep=1)
    stage_checkpoint(tmp_path, 2)
    assert last_checkpoint(tmp_path).name == "checkpoint-1"
    claim_folder(tmp_path, {"stage": "moe"})
    assert not (tmp_path / STAGING).exists()
    assert last_checkpoint(tmp_path).name == "checkpoint-1"


def test_publishing_a_step_again_replaces_it(tmp_path):
    put_in_place(stage_checkpoint(tmp_path, 4), tmp_path, keep=1)
    put_in_place(stage_checkpoint(tmp_path, 4), tmp_path, keep=1)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-4"]


def test_another_run_is_refused_with_both_sides(tmp_path):
    claim_folder(tmp_path, {"stage": "pretrain", "seed": 1})
    put_in_place(stage_checkpoint(tmp_path, 1), tmp_path, keep=1)
    assert check_folder(tmp_path, {"stage": "pretrain", "seed": 1}) is False
    with pytest.raises(UserError, match=r"seed: 1 there, 2 now"):
        check_folder(tmp_path, {"stage": "pretrain", "seed": 2})


def test_a_claim_without_a_checkpoint_protects_nothing(tmp_path):
    claim_folder(tmp_path, {"seed": 1})
    assert check_folder(tmp_path, {"seed": 2}) is False


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    claim_folder(tmp_path, {"seed": 1})
    mark_finished(tmp_path)
    assert check_folder(tmp_path, {"seed": 1}) is True
    with pytest.raises(UserError, match="another run"):
        check_folder(tmp_path, {"seed": 2})


def test_a_foreign_model_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a model"):
        check_folder(tmp_path, {"seed": 1})
