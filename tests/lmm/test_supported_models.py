# SPDX-License-Identifier: Apache-2.0
"""The registry of released models: what is known by an id, and what a config.json is found to be."""

import pytest

from moellava.errors import UnknownNameError
from moellava.lmm.architecture import ARCHITECTURES, architecture_of, holds_vlm
from moellava.lmm.collators import COLLATORS, MediaCollator
from moellava.lmm.datasets import TO_LOAD_IMAGE
from moellava.lmm.loaders import LOADERS
from moellava.lmm.supported_models import (
    LMM_FAMILIES,
    MULTIMODAL_KEYWORDS,
    SUPPORTED_MODELS,
    Architecture,
    register_family,
    register_model,
)
from moellava.model.build import read
from moellava.model.parts import LLAVA, Keywords
from tests.lmm.tiny import NATIVE, TINY, manifest_of


@pytest.mark.parametrize("name", NATIVE)
def test_the_architecture_follows_from_the_config(name):
    raw = TINY[name].tiny_config().to_dict()
    assert architecture_of(manifest_of(raw)).name == name
    raw["model_type"] = "moellava_" + raw["model_type"]
    raw["text_config"]["model_type"] = "moellava_" + raw["text_config"]["model_type"]
    assert architecture_of(manifest_of(raw)).name == name, "a sparse folder is of the architecture of its dense model"


def test_every_model_that_was_promised_is_known():
    """By what somebody types: the name and the size."""
    promised = {
        "llava-1.5": "7b 13b",
        "llava-1.6": "vicuna-7b vicuna-13b mistral-7b",
        "llava-interleave": "qwen-0.5b qwen-7b",
        "llava-next-video": "7b 7b-32k 34b",
        "llava-onevision": "0.5b-ov 7b-ov 72b-ov",
        "qwen2-vl": "2b-instruct 7b-instruct 72b-instruct",
        "qwen2.5-vl": "3b-instruct 7b-instruct 72b-instruct",
        "qwen-vl": "chat",
    }
    for family_id, sizes in promised.items():
        for size in sizes.split():
            assert SUPPORTED_MODELS[f"{family_id}-{size}"].family_id == family_id
    others = {"llama-3.2-11b-vision-instruct", "llama-3.2-90b-vision-instruct", "phi3-v"}
    assert others <= set(SUPPORTED_MODELS)
    assert {"qwen3-vl", "internvl", "smolvlm", "gemma3", "paligemma"} <= {
        m.family_id for m in SUPPORTED_MODELS.values()
    }


def test_a_language_model_of_the_same_type_is_no_vision_language_model():
    assert architecture_of(manifest_of({"model_type": "qwen", "visual": {}})).name == "qwen-vl"
    with pytest.raises(UnknownNameError, match="--model-path Qwen-7B .* 'qwen', which no architecture"):
        architecture_of(manifest_of({"model_type": "qwen"}, "Qwen-7B"))
    assert not holds_vlm(manifest_of({"model_type": "qwen"})) and not holds_vlm(manifest_of({"model_type": "llama"}))


def test_what_is_registered_is_a_vision_language_model_whatever_its_fields(architectures):
    raw = {"model_type": "stranger"}
    assert not holds_vlm(manifest_of(raw))
    register_family(Architecture("mine", LLAVA, model_type="stranger"))
    assert holds_vlm(manifest_of(raw)) and architecture_of(manifest_of(raw)) is architectures["mine"]
    assert architecture_of(manifest_of({"model_type": "llava", "moellava": {"version": "v1"}})) is None, "composed"


def test_every_architecture_has_models_and_a_row_of_tests():
    assert set(TINY) == set(ARCHITECTURES) == {model.family_id for model in SUPPORTED_MODELS.values()}
    for model in SUPPORTED_MODELS.values():
        assert model.architecture.models[model.model_id] == model.model_hf_path


def test_an_id_is_given_once_and_an_unknown_one_lists_the_known():
    with pytest.raises(ValueError, match="'llava-1.5-7b' is registered twice"):
        register_model(model_id="llava-1.5-7b", model_family_id="llava-1.5", model_hf_path="somebody/else")
    with pytest.raises(UnknownNameError, match=r"Did you mean 'qwen2-vl-2b-instruct'\?.*llava-1.5-7b"):
        SUPPORTED_MODELS["qwen2-vl-2b-instrukt"]
    with pytest.raises(UnknownNameError, match="Unknown architecture 'llava-9'.*qwen2-vl"):
        register_model(model_id="new", model_family_id="llava-9", model_hf_path="somebody/new")
    assert "new" not in SUPPORTED_MODELS
    with pytest.raises(ValueError, match="architecture 'llava-1.5' is registered twice"):
        register_family(Architecture("llava-1.5", LLAVA))
    with pytest.raises(UnknownNameError, match="'bert', which no architecture of moellava is. Known: gemma3, internvl"):
        architecture_of(manifest_of({"model_type": "bert"}))


def test_the_names_of_the_guide_are_views_that_can_be_written(architectures):
    assert MULTIMODAL_KEYWORDS["llava-1.5"] == LLAVA and LMM_FAMILIES is ARCHITECTURES
    assert LOADERS["llava-1.5"] is read and LOADERS["llama-3.2-vision"] is not read
    assert COLLATORS["llava-1.5"] is MediaCollator and issubclass(COLLATORS["paligemma"], MediaCollator)
    assert [name for name in TO_LOAD_IMAGE if not TO_LOAD_IMAGE[name]] == ["qwen-vl"]
    TO_LOAD_IMAGE["llava-1.5"] = False
    LOADERS["llava-1.5"] = print
    MULTIMODAL_KEYWORDS["llava-1.5"] = ("visual", "merger")
    changed = ARCHITECTURES["llava-1.5"]
    assert (changed.loads_images, changed.load, changed.model_type) == (False, print, "llava")
    assert changed.keywords == Keywords.of_vision(["visual", "merger"])
    assert SUPPORTED_MODELS["llava-1.5-7b"].architecture is changed
    assert len(COLLATORS) == len(ARCHITECTURES)
    with pytest.raises(UnknownNameError, match="Unknown architecture 'llava-9'"):
        COLLATORS["llava-9"] = MediaCollator
    assert "llava-9" not in COLLATORS
