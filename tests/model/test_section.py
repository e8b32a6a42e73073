# SPDX-License-Identifier: Apache-2.0
"""What a folder says of itself: written and read back, also as older versions wrote it."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

import pytest
from transformers import LlavaConfig

from moellava.constants import CHAT_TEMPLATE
from moellava.model.section import FORMAT, Section, note, section_of

FULL = Section(
    plugins=["mine.py"],
    version="v1",
    stage="finetune",
    architecture="llava-1.5",
    family="llama",
    image_aspect_ratio="pad",
    image_projector_type="mlp2x_gelu",
    image_tower="openai/clip",
    use_im_start_end=True,
    image_token_ids=[7, 8, 9],
    head_bias=True,
    softcap=30.0,
    parts={"vision_encoder": ["vision_tower"]},
    chat_template="{{ messages }}",
    made_of={"models": {"org/llm": {"license": "mit"}}},
)


def test_every_field_is_written_and_read_back(tmp_path):
    default = asdict(Section())
    assert all(value != default[name] for name, value in asdict(FULL).items()), "the test would see nothing of these"
    config = LlavaConfig()
    FULL.put(config)
    assert section_of(config) == FULL
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["moellava"] == {"format": FORMAT, **asdict(FULL)}
    assert section_of(raw) == section_of(LlavaConfig.from_pretrained(tmp_path)) == FULL


@pytest.mark.parametrize("config", [LlavaConfig(), {}, {"model_type": "llava"}, {"moellava": {}}, {"moellava": None}])
def test_a_config_without_a_section_says_nothing(config):
    assert section_of(config) is None


def test_sections_of_format_1_are_read():
    """There, a released model's architecture was its `lmm_family`; what is not known stands as null or not at all."""
    released = {"moellava": {"version": "chat_template", "lmm_family": "qwen2-vl"}}
    assert section_of(released) == Section(version=CHAT_TEMPLATE, architecture="qwen2-vl")
    composed = {
        "format": 1,
        "family": "phi",
        "version": "phi",
        "stage": None,
        "image_aspect_ratio": "square",
        "image_projector_type": "linear",
        "image_tower": None,
        "use_im_start_end": False,
        "image_token_ids": [50297],
        "head_bias": True,
    }
    expected = Section(
        version="phi", family="phi", image_projector_type="linear", image_token_ids=[50297], head_bias=True
    )
    assert section_of({"moellava": composed}) == expected


def test_an_old_section_is_written_in_the_format_of_today():
    config = LlavaConfig(moellava={"version": "chat_template", "lmm_family": "qwen2-vl"})
    note(config, stage="finetune")
    assert config.moellava == {"format": FORMAT, **asdict(Section(architecture="qwen2-vl", stage="finetune"))}


def test_what_a_later_version_adds_is_passed_over():
    assert section_of({"moellava": {"format": 9, "version": "v1", "colour": "green"}}) == Section(version="v1")


def test_a_note_changes_what_it_names_and_nothing_else():
    config = LlavaConfig()
    assert note(config) == section_of(config) == Section()
    FULL.put(config)
    for field in fields(Section):
        value = getattr(Section(), field.name)
        assert note(config, **{field.name: value}) == FULL.but(**{field.name: value})
        FULL.put(config)
    with pytest.raises(TypeError, match="colour"):
        note(config, colour="green")
    assert section_of(config) == FULL
