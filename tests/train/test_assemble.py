# SPDX-License-Identifier: Apache-2.0
"""What a stage starts from: which template it is given, and which files of it come from the hub."""

from __future__ import annotations

import json

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from moellava.errors import UserError
from tests.processes import train_here

SHORT = {"max_steps": 1, "save_strategy": "no", "skip_dry_save": True}


def template_of(folder):
    return json.loads((folder / "config.json").read_text())["moellava"]["version"]


def test_a_template_that_no_flag_names_follows_from_the_stage_and_the_folder(flags_for, tmp_path):
    def run(stage, **flags):
        return train_here(flags_for(tmp_path, stage) | SHORT | {"version": None} | flags)

    first = run("pretrain")
    assert template_of(first) == "plain"
    assert template_of(run("finetune")) == "qwen", "the language model's"
    own = dict.fromkeys(("image_tower", "image_projector_type", "pretrain_mm_mlp_adapter"))
    again = run("finetune", **own, model_name_or_path=first, output_dir=tmp_path / "again")
    assert template_of(again) == "qwen", "stage 1's is for captions alone"
    second = run("finetune", version="v1", force_version=True, output_dir=tmp_path / "v1")
    assert template_of(run("moe", model_name_or_path=second)) == "v1", "the folder's own"


@pytest.mark.parametrize("kernel", ["fusde", "megablocks"])
def test_what_cannot_run_the_experts_is_told_before_weights_are_read(kernel, flags_for, monkeypatch, tmp_path):
    monkeypatch.setattr("moellava.train.assemble.build", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(UserError, match=f"--moe_kernel .?{kernel}"):
        train_here(flags_for(tmp_path, "moe") | SHORT | {"moe_kernel": kernel})


@pytest.mark.parametrize("named", ["model_name_or_path", "model_local_path"])
@pytest.mark.parametrize("trusted", [True, False])
def test_code_comes_from_the_hub_only_where_it_is_trusted(named, trusted, monkeypatch, tmp_path):
    asked = []

    def offline(name, allow_patterns):
        asked.append("*.py" in allow_patterns)
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    (tmp_path / "d.json").write_text("[]")
    flags = {
        "data_path": tmp_path / "d.json",
        "output_dir": tmp_path / "run",
        "report_to": "none",
        "trust_remote_code": trusted,
    }
    with pytest.raises(UserError, match="no/model"):
        train_here(flags | {named: "no/model"})
    assert asked == [trusted]
