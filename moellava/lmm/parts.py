"""The parts of a model, found by the keywords of its family: for classes whose layout `parts_of` does not know."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import nn

from moellava.lmm.supported_models import Keywords
from moellava.model.builder import has_known_parts


def bring_parts(model: Any, keywords: Keywords) -> None:
    """Gives a model of an unusual layout `own_parts`, which `parts_of` asks."""
    if not has_known_parts(model):
        model.own_parts = functools.partial(parts_by_keywords, model, keywords)


def parts_by_keywords(model: Any, keywords: Keywords) -> dict[str, nn.Module]:
    """The parts of a model as `parts_of` names them.

    Args:
        model: of any class.
        keywords: of its family; what belongs to no part goes with the projector.
    """
    head = model.get_output_embeddings()
    decoder = [held for held in held_at(model, keywords.language_model) if held is not head]
    return {
        "vision_tower": nn.ModuleList(held_at(model, keywords.vision_encoder)),
        "projector": nn.ModuleList(held_at(model, (*keywords.vision_projector, *keywords.others))),
        "language_model": nn.ModuleList(decoder),
        "lm_head": head,
    }


def held_at(model: Any, names: Sequence[str]) -> list[nn.Module]:
    """The modules of these names, in the model or in its `model`; a parameter as a list of itself alone."""
    found = []
    for name in names:
        inside = not hasattr(model, name.partition(".")[0])
        held = attrgetter(name)(model.model if inside else model)
        found.append(nn.ParameterList([held]) if isinstance(held, nn.Parameter) else held)
    return found
