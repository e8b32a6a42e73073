# SPDX-License-Identifier: Apache-2.0
"""What plain transformers lacks: it saves and opens here, and there it is refused, never silently wrong."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaForConditionalGeneration

from moellava.auto_classes import PREFIX
from moellava.errors import UserError
from moellava.model.extended import as_extended, base_of, extend_in_place, extension_of
from moellava.model.manifest import VLM, read_folder
from moellava.moe import MoESpec, moe_layers, upcycle
from moellava.vlm import open_vlm
from tests.tiny import compose_tiny, reopen

BEYOND = ["moe", "residual", "head bias", "deep projector", "all"]


@pytest.fixture
def extended(make_base, clip_tower):
    """what it has beyond Hugging Face's class -> such a composed model, with weights that no initialisation gives."""

    def make(beyond):
        name = "phi" if beyond in ("head bias", "all") else "qwen2"
        projector = "mlp3x_gelu" if beyond in ("deep projector", "all") else "linear"
        made = compose_tiny(make_base(name).folder, clip_tower, "plain", image_projector_type=projector)
        if beyond in ("moe", "residual", "all"):
            spec = MoESpec(num_experts=[2, 4], moe_mode="sparse", use_residual=beyond == "residual")
            upcycle(made.model, spec)
            made.model.config.moe = spec.to_config()
            torch.manual_seed(5)
            with torch.no_grad():
                for _, layer in moe_layers(made.model):
                    for parameter in layer.parameters():
                        parameter.add_(0.1 * torch.randn_like(parameter))
        return made

    return make


@pytest.mark.parametrize("beyond", BEYOND)
def test_round_trip_and_refusal(beyond, extended, inputs, plain_transformers, tmp_path):
    made = extended(beyond)
    batch = inputs(made.model)
    with torch.no_grad():
        wanted = made.model.eval()(**batch).logits
    made.save(tmp_path, meta={"stage": "moe"})
    model = reopen(tmp_path).model
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, wanted)
    manifest = read_folder(tmp_path, "test")
    assert manifest.holds == VLM and manifest.is_sparse == (beyond in ("moe", "residual", "all"))
    page = (tmp_path / "README.md").read_text()
    assert "This folder needs moellava" in page and all(reason in page for reason in extension_of(model.config).reasons)

    for opener in (LlavaForConditionalGeneration, AutoModelForImageTextToText, AutoConfig):
        with pytest.raises((ValueError, KeyError), match=PREFIX):
            opener.from_pretrained(tmp_path)


def test_saving_twice_gives_the_same_config(extended, tmp_path):
    made = extended("moe")
    for name in ("one", "two"):
        made.save(tmp_path / name)
        made = reopen(tmp_path / name)
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two"))
    assert first == second and first["text_config"]["model_type"] == f"{PREFIX}qwen2"


def test_routers_stay_in_fp32(extended, tmp_path):
    made = extended("moe")
    made.save(tmp_path)
    model = open_vlm(tmp_path, device="cpu", dtype=torch.bfloat16).model
    (_, layer), *_ = moe_layers(model)
    assert layer.router.weight.dtype == torch.float32
    assert {parameter.dtype for parameter in layer.experts.parameters()} == {torch.bfloat16}


def test_a_model_that_was_upcycled_after_it_was_built_becomes_extended(extended):
    model = extended("moe").model
    assert type(model) is LlavaForConditionalGeneration
    extend_in_place(model)
    extend_in_place(model)
    assert isinstance(model, LlavaForConditionalGeneration) and model.config.model_type == f"{PREFIX}llava"
    assert model.config.text_config.model_type == "qwen2" and as_extended(model.config) is model.config


def test_a_folder_that_extends_an_unknown_class_is_refused():
    assert base_of("moellava_llava") is LlavaForConditionalGeneration
    assert base_of("moellava_qwen2_vl").__name__ == "Qwen2VLForConditionalGeneration"
    with pytest.raises(UserError, match="'nothing' model"):
        base_of("moellava_nothing")
