# SPDX-License-Identifier: Apache-2.0
"""Parts by keywords, on a small module tree."""

import pytest
import torch
from torch import nn

from moellava.errors import UserError
from moellava.model.parts import LLAVA, Keywords, group_of, parts_of


class Small(nn.Module):
    """Laid out as LLaVA's: `model.vision_tower` …, and a head."""

    def __init__(self, projector: nn.Module, tied: bool = False):
        super().__init__()
        self.model = nn.Module()
        self.model.vision_tower = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.model.multi_modal_projector = projector
        self.model.language_model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "layer": nn.Linear(2, 2)})
        self.model.image_newline = nn.Parameter(torch.zeros(2))
        self.lm_head = nn.Linear(2, 3, bias=False)
        if tied:
            self.lm_head.weight = self.model.language_model["embed"].weight

    def get_output_embeddings(self):
        return self.lm_head


NEXT = LLAVA._replace(others=("image_newline",))


def test_a_part_is_the_largest_modules_that_belong_to_it():
    model = Small(nn.Linear(2, 2))
    parts = parts_of(model, NEXT)
    assert list(parts["vision_tower"]) == [model.model.vision_tower]
    assert list(parts["language_model"]) == [model.model.language_model] and list(parts["lm_head"]) == [model.lm_head]
    newline, projector = sorted(parts["projector"], key=lambda part: isinstance(part, nn.Linear))
    assert projector is model.model.multi_modal_projector and list(newline)[0] is model.model.image_newline


def test_a_projector_that_is_the_identity_is_a_part_all_the_same():
    model = Small(nn.Identity())
    assert model.model.multi_modal_projector in list(parts_of(model, NEXT)["projector"])


def test_a_head_inside_the_language_model_is_its_own_part():
    model = Small(nn.Linear(2, 2))
    model.model.language_model["lm_head"] = model.lm_head
    del model.lm_head
    model.get_output_embeddings = lambda: model.model.language_model["lm_head"]
    parts = parts_of(model, NEXT)
    assert list(parts["language_model"]) == [model.model.language_model[name] for name in ("embed", "layer")]
    assert list(parts["lm_head"]) == [model.model.language_model["lm_head"]]


def test_a_head_that_is_the_embedding_is_in_both():
    model = Small(nn.Linear(2, 2), tied=True)
    parts = parts_of(model, NEXT)
    assert list(parts["lm_head"]) == [model.lm_head]
    assert list(parts["language_model"]) == [model.model.language_model]


def test_a_plain_list_is_the_vision_part_and_all_else_the_language_model():
    model = Small(nn.Linear(2, 2))
    parts = parts_of(model, Keywords.of_vision(["vision_tower", "multi_modal_projector"]))
    assert list(parts["vision_tower"]) == [model.model.vision_tower, model.model.multi_modal_projector]
    assert not len(parts["projector"]) and list(parts["lm_head"]) == [model.lm_head]
    assert model.model.image_newline in list(parts["language_model"].parameters())


def test_keywords_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"Parameter model.image_newline fits 0 of the keywords .*\(none\)"):
        parts_of(Small(nn.Linear(2, 2)), LLAVA)
    with pytest.raises(UserError, match="No parameter of Small begins with visual, .*: image_newline, language_model"):
        parts_of(Small(nn.Linear(2, 2)), Keywords.of_vision(["visual", "multi_modal_projector"]))


def test_a_parameter_that_fits_none_or_two_keywords_is_an_error():
    keywords = Keywords(("vision",), ("vision.merger",), ("language_model",))
    assert group_of("model.language_model.norm.weight", keywords) == "language_model"
    with pytest.raises(UserError, match=r"model.vision.merger.weight fits 2 .*\(vision, vision.merger\)"):
        group_of("model.vision.merger.weight", keywords)
    with pytest.raises(UserError, match=r"lm_head.weight fits 0 .*\(none\)"):
        group_of("lm_head.weight", keywords)
    with pytest.raises(UserError, match="fits 0"):
        group_of("model.vision_tower.weight", keywords)
