# SPDX-License-Identifier: Apache-2.0
"""The parts of every architecture's real class, by its keywords."""

import pytest
from torch import nn
from transformers import AutoModelForImageTextToText

from moellava.lmm.architecture import ARCHITECTURES
from moellava.model.parts import PART_OF, Keywords, group_names, parts_of
from tests.lmm.tiny import NATIVE, TINY


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def model_and_keywords(request, opened):
    """Of a new model; of the tiny folder where a class is not one of transformers."""
    keywords = ARCHITECTURES[request.param].keywords
    if request.param not in NATIVE:
        return opened(request.param).model, keywords
    return AutoModelForImageTextToText.from_config(TINY[request.param].tiny_config()), keywords


TOWERS_AT = ("vision_tower", "vision_model", "visual")
PROJECTORS_AT = ("multi_modal_projector", "connector")
MERGERS = ("merger", "deepstack_merger_list")


def known_layout(model):
    """The parts by the attributes that transformers' classes are known to have; mergers lie inside an encoder."""
    inner = model.model
    tower = next(getattr(inner, name) for name in TOWERS_AT if hasattr(inner, name))
    projector = [getattr(inner, name) for name in PROJECTORS_AT if hasattr(inner, name)]
    if not projector:
        projector = [child for name, child in tower.named_children() if name in MERGERS]
        tower = nn.ModuleList(child for name, child in tower.named_children() if name not in MERGERS)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    return {
        "vision_tower": tower,
        "projector": nn.ModuleList(projector),
        "language_model": decoder,
        "lm_head": head,
    }


def ids_of(parts):
    return {name: sorted(id(parameter) for parameter in part.parameters()) for name, part in parts.items()}


def test_each_parameter_is_in_exactly_one_part(model_and_keywords):
    held = ids_of(parts_of(*model_and_keywords))
    assert sorted(sum(held.values(), [])) == sorted(map(id, model_and_keywords[0].parameters()))
    assert all(held.values())


def test_parts_are_what_the_keywords_say(model_and_keywords):
    model, keywords = model_and_keywords
    held = ids_of(parts_of(model, keywords))
    head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    for field, names in group_names([name for name, _ in model.named_parameters()], keywords).items():
        assert {id(model.get_parameter(name)) for name in names} - head <= set(held[PART_OF[field]]), field
    assert set(held["lm_head"]) == head


@pytest.mark.parametrize("name", NATIVE)
def test_parts_are_those_of_the_layouts_that_were_known(name):
    model = AutoModelForImageTextToText.from_config(TINY[name].tiny_config())
    keywords = ARCHITECTURES[name].keywords
    assert list(parts_of(model, keywords)["language_model"]) == [model.get_decoder()]
    known, found = ids_of(known_layout(model)), ids_of(parts_of(model, keywords))
    others = {id(model.get_parameter(path)) for path in group_names(dict(model.named_parameters()), keywords)["others"]}
    assert {**found, "projector": sorted(set(found["projector"]) - others)} == known


@pytest.mark.parametrize("name", NATIVE)
def test_a_plain_list_of_vision_keywords_leaves_the_rest_to_the_language_model(name):
    model = AutoModelForImageTextToText.from_config(TINY[name].tiny_config())
    keywords = ARCHITECTURES[name].keywords
    plain = Keywords.of_vision(keywords.vision_encoder + keywords.vision_projector + keywords.others)
    exact, rest = ids_of(parts_of(model, keywords)), ids_of(parts_of(model, plain))
    assert rest["vision_tower"] == sorted(exact["vision_tower"] + exact["projector"]) and not rest["projector"]
    assert (rest["language_model"], rest["lm_head"]) == (exact["language_model"], exact["lm_head"])
