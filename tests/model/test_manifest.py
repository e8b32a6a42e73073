# SPDX-License-Identifier: Apache-2.0
"""What a folder holds is told by its config, read once; its name tells nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moellava.errors import UserError
from moellava.files import CODE_FILES, MODEL_FILES
from moellava.model.manifest import LANGUAGE_MODEL, TOWER, VLM, Manifest, read_folder
from moellava.moe import MoESpec
from tests.tiny import compose_tiny


def holding(**config: object) -> Manifest:
    return Manifest(Path("anywhere"), "anywhere", "--model-path", config)


@pytest.fixture(scope="module")
def stage_folder(make_base, clip_tower, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("manifest") / "a-language-model-and-no-llava"
    compose_tiny(make_base("llama").folder, clip_tower, "plain").save(folder, meta={"stage": "pretrain"})
    return folder


def test_folders_are_told_apart_by_their_config(stage_folder, make_base, clip_tower, siglip_tower, checkpoints):
    """(what it holds, whether LLaVA's code wrote it, whether it is sparse)"""
    expected = {
        stage_folder: (VLM, False, False),
        make_base("llama").folder: (LANGUAGE_MODEL, False, False),
        clip_tower: (TOWER, False, False),
        siglip_tower: (TOWER, False, False),
        checkpoints / "phi" / "dense": (VLM, True, False),
        checkpoints / "phi" / "moe_sparse": (VLM, True, True),
        checkpoints / "qwen" / "dense": (VLM, True, False),
    }
    found = {path: read_folder(path, "test") for path in expected}
    assert {path: (each.holds, each.is_published, each.is_sparse) for path, each in found.items()} == expected


@pytest.mark.parametrize(
    ("config", "holds"),
    [
        ({"model_type": "clip"}, TOWER),
        ({"model_type": "qwen2_vl", "vision_config": {}}, VLM),
        ({"model_type": "qwen", "visual": {"layers": 2}}, VLM),
        ({"model_type": "phi3_v", "img_processor": {}}, VLM),
        ({"model_type": "moellava_llava", "text_config": {}}, VLM),
        ({"model_type": "anything", "moellava": {"version": "v1"}}, VLM),
        ({"model_type": "llava_llama", "mm_vision_tower": "openai/clip"}, VLM),
        ({"model_type": "qwen2"}, LANGUAGE_MODEL),
        ({}, LANGUAGE_MODEL),
    ],
)
def test_what_a_config_says(config, holds):
    assert holding(**config).holds == holds


def test_sparse_is_what_was_upcycled():
    assert holding(moe=MoESpec().to_config()).is_sparse
    assert holding(moe={"moe_enable": True, "num_experts": [4]}).is_sparse
    assert not holding(moe={"moe_enable": False}).is_sparse
    assert not holding(moe={}).is_sparse and not holding(moe=None).is_sparse


def test_a_folder_is_read_once(stage_folder, tmp_path):
    path = tmp_path / "config.json"
    path.write_text((stage_folder / "config.json").read_text())
    manifest = read_folder(tmp_path, "--model-path")
    path.write_text(json.dumps({"model_type": "qwen2"}))
    assert manifest.holds == VLM and not manifest.is_sparse
    assert (manifest.section.stage, manifest.section.family, manifest.section.version) == ("pretrain", "llama", "plain")
    assert read_folder(tmp_path, "--model-path").section is None


def test_sections_of_format_1_are_read():
    manifest = holding(model_type="qwen2_vl", vision_config={}, moellava={"lmm_family": "qwen2-vl"})
    assert manifest.holds == VLM and manifest.section.architecture == "qwen2-vl"


def test_a_base_is_a_language_model_or_its_tokenizer_alone(stage_folder, make_base, tokenizer_folder, tmp_path):
    base = read_folder(stage_folder, "test", base=make_base("llama").folder).base
    assert base.holds == LANGUAGE_MODEL and base.folder == make_base("llama").folder and base.base is None
    assert read_folder(stage_folder, "test", base=tokenizer_folder).base.config == {}
    assert read_folder(stage_folder, "test").base is None
    with pytest.raises(UserError, match="^--model-base .*nowhere: there is no such folder"):
        read_folder(stage_folder, "test", base=tmp_path / "nowhere")


def test_what_is_no_model_folder_is_named_by_its_flag(tmp_path):
    with pytest.raises(UserError, match="^--model-path .*nowhere: there is no such folder"):
        read_folder(tmp_path / "nowhere", "--model-path")
    with pytest.raises(UserError, match="^--model_name_or_path .* holds no config.json, so it is not a model folder"):
        read_folder(tmp_path, "--model_name_or_path")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="holds a list where a JSON object"):
        read_folder(tmp_path, "--model-path")


def test_hub_ids_are_fetched_without_code_unless_asked_for(stage_folder, monkeypatch):
    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, tuple(allow_patterns)))
        return str(stage_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    manifest = read_folder("org/model", "--model-path")
    assert (manifest.folder, manifest.name) == (stage_folder, "org/model")
    read_folder("org/model", "--model-path", patterns=MODEL_FILES + CODE_FILES)
    assert asked == [("org/model", MODEL_FILES), ("org/model", (*MODEL_FILES, "*.py"))]
    assert not any(pattern.endswith("py") for pattern in MODEL_FILES)
