"""What a folder says of itself: in words of today, of before, and of a later version."""

from __future__ import annotations

import json

from transformers import LlamaConfig

from moellava.model.section import FORMAT, Section, note, section_of


def test_a_section_comes_back_from_a_config_and_from_its_file(tmp_path):
    section = Section(version="v1", stage="finetune", family="llama", image_token_ids=[7])
    config = LlamaConfig()
    section.put(config)
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["moellava"]["format"] == FORMAT
    assert section_of(config) == section_of(raw) == section_of(LlamaConfig.from_pretrained(tmp_path)) == section


def test_names_of_before_are_read_and_unknown_ones_left_out():
    raw = {"moellava": {"format": 1, "lmm_family": "qwen2-vl", "version": "qwen", "of_tomorrow": 1, "stage": None}}
    assert section_of(raw) == Section(version="qwen", architecture="qwen2-vl")


def test_a_note_keeps_what_it_does_not_change():
    config = LlamaConfig()
    assert section_of(config) is None and section_of({}) is None
    note(config, version="v1", family="llama")
    note(config, stage="moe")
    assert section_of(config) == Section(version="v1", family="llama", stage="moe")
