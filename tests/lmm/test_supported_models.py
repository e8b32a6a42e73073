"""The registry of released models, and the parts of each family's real class."""

import pytest
from transformers import AutoModelForImageTextToText

from moellava.errors import UnknownNameError, UserError
from moellava.lmm.parts import parts_by_keywords
from moellava.lmm.supported_models import (
    LMM_FAMILIES,
    MULTIMODAL_KEYWORDS,
    SUPPORTED_MODELS,
    Keywords,
    LMMFamily,
    group_names,
    group_of,
    lmm_family_of,
    register_family,
    register_model,
)
from moellava.model.builder import parts_of

NATIVE = [name for name, family in LMM_FAMILIES.items() if not family.remote_code]


@pytest.fixture(scope="module", params=NATIVE)
def family_and_model(request, tiny_lmm_config):
    return request.param, AutoModelForImageTextToText.from_config(tiny_lmm_config(request.param))


def test_the_groups_cover_every_parameter_exactly_once(family_and_model):
    family_id, model = family_and_model
    names = [name for name, _ in model.named_parameters()]
    groups = group_names(names, MULTIMODAL_KEYWORDS[family_id])
    assert sorted(name for group in groups.values() for name in group) == sorted(names)
    assert all(groups[part] for part in ("vision_encoder", "vision_projector", "language_model"))


def test_the_language_model_is_what_the_class_calls_its_decoder(family_and_model):
    family_id, model = family_and_model
    decoder = {id(parameter) for parameter in model.get_decoder().parameters()}
    decoder |= {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    groups = group_names([name for name, _ in model.named_parameters()], MULTIMODAL_KEYWORDS[family_id])
    assert {id(model.get_parameter(name)) for name in groups["language_model"]} == decoder


def test_what_flags_choose_is_what_the_keywords_say(family_and_model):
    """By the layouts that are known, and by the keywords alone, as for classes of another layout."""
    family_id, model = family_and_model
    keywords = MULTIMODAL_KEYWORDS[family_id]
    groups = group_names([name for name, _ in model.named_parameters()], keywords)
    named = {part: {id(model.get_parameter(name)) for name in names} for part, names in groups.items()}
    for parts in (parts_of(model), parts_by_keywords(model, keywords)):
        held = {name: {id(parameter) for parameter in part.parameters()} for name, part in parts.items()}
        assert held["vision_tower"] == named["vision_encoder"]
        assert held["projector"] - named["others"] == named["vision_projector"]
        assert held["language_model"] | held["lm_head"] == named["language_model"]


def test_the_family_follows_from_the_config(family_and_model):
    family_id, model = family_and_model
    raw = model.config.to_dict()
    assert lmm_family_of(raw).family_id == family_id
    raw["model_type"] = "moellava_" + raw["model_type"]
    raw["text_config"]["model_type"] = "moellava_" + raw["text_config"]["model_type"]
    assert lmm_family_of(raw).family_id == family_id, "a sparse folder is of the family of its dense model"


def test_every_model_that_was_promised_is_known():
    """By what somebody types: the family's name and the size."""
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
            assert SUPPORTED_MODELS[f"{family_id}-{size}"].family.family_id == family_id
    others = {"llama-3.2-11b-vision-instruct", "llama-3.2-90b-vision-instruct", "phi3-v"}
    assert others <= set(SUPPORTED_MODELS)
    assert {"qwen3-vl", "internvl", "smolvlm", "gemma3", "paligemma"} <= {
        m.family.family_id for m in SUPPORTED_MODELS.values()
    }


def test_a_language_model_of_the_same_type_is_no_vision_language_model():
    assert lmm_family_of({"model_type": "qwen", "visual": {}}).family_id == "qwen-vl"
    with pytest.raises(UnknownNameError, match="'qwen', which no family"):
        lmm_family_of({"model_type": "qwen"}, "Qwen-7B")


def test_every_family_has_models_and_keywords():
    assert {model.family.family_id for model in SUPPORTED_MODELS.values()} == set(LMM_FAMILIES)
    assert set(MULTIMODAL_KEYWORDS) == set(LMM_FAMILIES)


def test_an_id_is_given_once_and_an_unknown_one_lists_the_known():
    with pytest.raises(ValueError, match="'llava-1.5-7b' is registered twice"):
        register_model(model_id="llava-1.5-7b", model_family_id="llava-1.5", model_hf_path="somebody/else")
    with pytest.raises(UnknownNameError, match=r"Did you mean 'qwen2-vl-2b-instruct'\?.*llava-1.5-7b"):
        SUPPORTED_MODELS["qwen2-vl-2b-instrukt"]
    with pytest.raises(UnknownNameError, match="Unknown model family 'llava-9'.*qwen2-vl"):
        register_model(model_id="new", model_family_id="llava-9", model_hf_path="somebody/new")
    assert "new" not in SUPPORTED_MODELS
    with pytest.raises(ValueError, match="no entry in MULTIMODAL_KEYWORDS"):
        register_family(LMMFamily("llava-9", "llava_nine"))
    with pytest.raises(UnknownNameError, match="'bert', which no family of moellava is. Known: gemma3, internvl"):
        lmm_family_of({"model_type": "bert"})


def test_a_parameter_that_fits_none_or_two_keywords_is_an_error():
    keywords = Keywords(("vision",), ("vision.merger",), ("language_model",))
    assert group_of("model.language_model.norm.weight", keywords) == "language_model"
    with pytest.raises(UserError, match=r"model.vision.merger.weight fits 2 entries .*\(vision, vision.merger\)"):
        group_of("model.vision.merger.weight", keywords)
    with pytest.raises(UserError, match=r"lm_head.weight fits 0 entries .*\(none\)"):
        group_of("lm_head.weight", keywords)
    with pytest.raises(UserError, match="fits 0"):
        group_of("model.vision_tower.weight", keywords)
