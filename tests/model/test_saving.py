# SPDX-License-Identifier: Apache-2.0
"""Folders appear whole or not at all: full disks, stale shards, tied weights, and what the folder says of itself."""

from __future__ import annotations

import copy
import errno
import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer

from moellava.model import saving
from moellava.vlm import VLM
from tests.processes import no_file_above
from tests.tiny import compose_tiny, reopen


@pytest.fixture(scope="module")
def made(make_base, clip_tower):
    return compose_tiny(make_base("qwen2", tied=True).folder, clip_tower, "plain")


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_folder_is_complete(made, tmp_path):
    made.save(tmp_path, meta={"stage": "finetune"})
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "processor_config.json",
        "chat_template.jinja",
    } <= names
    assert {"generation_config.json", "README.md"} <= names and saving.STAGING not in names
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["moellava"]["stage"] == "finetune" and config["model_type"] == "llava"
    assert config["architectures"] == ["LlavaForConditionalGeneration"]


def test_the_template_is_the_stages_and_not_one_that_the_tokenizer_brings(made, tmp_path):
    brought = copy.deepcopy(made.tokenizer)
    brought.chat_template = "the base model's"
    VLM(made.model, brought, made.processor, made.keywords).save(tmp_path)
    for auto in (AutoTokenizer, AutoProcessor):
        assert auto.from_pretrained(tmp_path).chat_template == made.processor.chat_template, auto


def test_tied_weights_are_stored_once_under_the_models_own_names(made, tmp_path):
    made.save(tmp_path)
    stored, state = load_file(tmp_path / "model.safetensors"), made.model.state_dict()
    assert set(state) - set(stored) == {"lm_head.weight"} and not set(stored) - set(state)
    assert all(torch.equal(stored[name], state[name]) for name in stored)


def test_names_that_share_memory_are_written_apart(made, tmp_path):
    """A head that looks tied but whose config says it is not, as after loading one tensor under two names."""
    untied = copy.deepcopy(made.model)
    untied.config.tie_word_embeddings = untied.config.text_config.tie_word_embeddings = False
    VLM(untied, made.tokenizer, made.processor, made.keywords).save(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], stored["model.language_model.embed_tokens.weight"])
    reopen(tmp_path)


def test_a_given_state_dict_is_what_is_written(made, tmp_path):
    state = {name: tensor + 1 for name, tensor in made.model.state_dict().items()}
    made.save(tmp_path, state_dict=state)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.language_model.norm.weight"
    assert torch.equal(stored[name], made.model.state_dict()[name] + 1)


def test_shards_are_indexed_and_those_of_an_earlier_save_go(made, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "MAX_SHARD_SIZE", "40KB")
    made.save(tmp_path)
    many = list(tmp_path.glob("model-*.safetensors"))
    assert len(many) > 2 and (tmp_path / saving.INDEX).exists()
    model = reopen(tmp_path).model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), made.model.parameters()))
    monkeypatch.setattr(saving, "MAX_SHARD_SIZE", "1GB")
    made.save(tmp_path)
    assert not list(tmp_path.glob("model-*.safetensors")) and not (tmp_path / saving.INDEX).exists()
    reopen(tmp_path)


def test_other_files_in_the_folder_stay(made, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "trainer_state.json").write_text("{}")
    made.save(tmp_path)
    assert (tmp_path / "checkpoint-3").is_dir() and (tmp_path / "trainer_state.json").exists()


def test_a_disk_without_room_is_seen_before_anything_is_written(made, tmp_path, monkeypatch):
    made.save(tmp_path)
    before = snapshot(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(OSError, match="0.00 GB are free") as caught:
        made.save(tmp_path, meta={"stage": "later"})
    assert caught.value.errno == errno.ENOSPC and snapshot(tmp_path) == before


@pytest.mark.parametrize("failing", ["write_weights", "folder_page", "flush"])
def test_a_save_that_fails_half_way_leaves_the_old_folder(made, tmp_path, monkeypatch, failing):
    made.save(tmp_path)
    before = snapshot(tmp_path)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, failing, full)
    with pytest.raises(OSError, match="No space left"):
        made.save(tmp_path, meta={"stage": "later"})
    assert snapshot(tmp_path) == before and not (tmp_path / saving.STAGING).exists()
    reopen(tmp_path)


@pytest.mark.parametrize("limit", [30_000, 400])
def test_a_disk_that_fills_up_leaves_the_old_folder(made, tmp_path, limit):
    """A real failing write, in the weights and in the config."""
    made.save(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(OSError), no_file_above(limit):
        made.save(tmp_path, meta={"stage": "later"})
    assert snapshot(tmp_path) == before and not (tmp_path / saving.STAGING).exists()


def test_a_folder_that_cannot_be_written_raises_an_os_error(made, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        made.save(tmp_path / "file" / "folder")
