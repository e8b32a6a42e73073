# SPDX-License-Identifier: Apache-2.0
"""Model folders as commands are given them, without weights: what reads records needs none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.tiny import compose_tiny


@pytest.fixture
def folder_without_weights(tiny_base, clip_tower, tmp_path) -> Path:
    """What a stage has left, template phi, 5 tokens an image; its weights are gone."""
    folder = tmp_path / "composed"
    compose_tiny(tiny_base("phi2"), clip_tower, "phi", mm_vision_select_feature="cls_patch").save(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return folder


@pytest.fixture
def published_folder(checkpoints, tmp_path) -> Path:
    """What LLaVA's code has left, 16 tokens an image, without a tokenizer and without weights."""
    folder = tmp_path / "published"
    shutil.copytree(checkpoints / "openai", tmp_path / "openai")
    shutil.copytree(checkpoints / "llama/dense", folder)
    (folder / "pytorch_model.bin").unlink()
    return folder
