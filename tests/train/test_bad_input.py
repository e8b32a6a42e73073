# SPDX-License-Identifier: Apache-2.0
"""Mistakes are found before a step is made, named, and lose nothing."""

import json
import resource

import pytest

from moellava.errors import UserError
from tests.processes import train_here
from tests.tiny import record


@pytest.fixture
def flags(flags_for, tmp_path):
    """Stage-1 flags with a fresh output folder."""
    return flags_for(tmp_path, "pretrain")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "vicuna_v9"}, "vicuna_v9.*Known: .*plain"),
        ({"image_projector_type": "mlp"}, "mlp.*linear"),
        ({"image_aspect_ratio": "wide"}, "--image_aspect_ratio wide"),
        ({"model_name_or_path": "no/such/folder"}, "no/such/folder"),
        ({"image_tower": "no/such/tower"}, "no/such/tower"),
        ({"data_path": "no/such/file.json"}, "no/such/file.json"),
    ],
)
def test_a_wrong_name_is_named(flags, change, said):
    with pytest.raises(UserError, match=f"(?s){said}"):
        train_here(flags | change)


def test_a_tower_in_place_of_a_language_model(flags, parts):
    with pytest.raises(UserError, match="is a vision tower"):
        train_here(flags | {"model_name_or_path": parts / "tower"})


def test_a_language_model_in_place_of_a_tower(flags, parts):
    with pytest.raises(UserError, match="tower"):
        train_here(flags | {"image_tower": parts / "lm"})


def test_a_language_model_without_a_tower(flags):
    del flags["image_tower"]
    with pytest.raises(UserError, match="without a vision tower: add --image_tower"):
        train_here(flags)


def test_stage_3_from_a_bare_language_model(flags, parts):
    del flags["tune_mm_mlp_adapter"]
    with pytest.raises(UserError, match="starts from a stage-2 folder"):
        train_here(flags | {"moe_enable": True})


def test_every_missing_or_truncated_image_is_named_at_once(flags, parts, tmp_path):
    (tmp_path / "half.png").write_bytes((parts / "images" / "0.png").read_bytes()[:60])
    bad = [
        record("gone", "<image>", "a", image="gone.png"),
        record("cut", "<image>", "a", image="half.png"),
    ]
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    with pytest.raises(UserError) as caught:
        train_here(flags | {"data_path": tmp_path / "bad.json", "image_folder": tmp_path})
    for named in ("gone.png", "half.png", "Record gone of", "Record cut of"):
        assert named in str(caught.value)


def test_all_malformed_records_come_at_once(flags, tmp_path):
    bad = [
        record("two", "<image><image>", "a", image="0.png"),
        {"id": "empty"},
        {"id": "twice", "conversations": [{"from": "gpt", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ]
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    with pytest.raises(UserError) as caught:
        train_here(flags | {"data_path": tmp_path / "bad.json"})
    for named in ("two", "empty", "twice", "bad.json"):
        assert named in str(caught.value)
    assert not (tmp_path / "pretrain").exists(), "nothing was started"


@pytest.mark.slow
def test_another_runs_folder_is_refused_and_a_full_disk_loses_nothing(
    flags, run_train, kill_train, losses_of, tmp_path
):
    """A limit on file sizes stands for the full disk: the system refuses the write in the middle of a save."""
    reference = run_train(flags | {"output_dir": tmp_path / "reference"})
    assert reference.returncode == 0, reference.stderr[-3000:]
    kill_train(flags, "checkpoint-2")

    with pytest.raises(UserError, match=r"seed: 42 there, 7 now"):
        train_here(flags | {"seed": 7})

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    result = run_train(flags | {"skip_dry_save": True}, preexec_fn=small_disk)
    assert result.returncode == 2
    assert "last complete checkpoint" in result.stderr
    assert "checkpoint-2" in result.stderr
    assert (flags["output_dir"] / "checkpoint-2" / "model.safetensors").exists()

    result = run_train(flags, preexec_fn=small_disk)
    assert result.returncode == 2
    assert "dry save before step 0 failed" in result.stderr

    assert run_train(flags).returncode == 0
    assert losses_of(flags["output_dir"]) == losses_of(tmp_path / "reference")
