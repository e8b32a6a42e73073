# SPDX-License-Identifier: Apache-2.0
"""The parts of a vision-language model, by the names of its parameters; which names, is data: `Keywords`.

model.vision_tower.…            vision_tower
model.multi_modal_projector.…   projector
model.language_model.…          language_model
lm_head.…                       lm_head
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from moellava.errors import UserError


class Keywords(NamedTuple):
    """Where the parts of a model are: beginnings of parameter names, without the leading `model.`.

    Every parameter begins with exactly one of them. Whole name components are compared.

    Attributes:
        vision_encoder: what turns pixels into features.
        vision_projector: what turns features into embeddings of the language model.
        language_model: embeddings, decoder and head; () means whatever the other keywords leave.
        others: parameters of no part; they train with the projector.
    """

    vision_encoder: tuple[str, ...]
    vision_projector: tuple[str, ...] = ()
    language_model: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @classmethod
    def of_vision(cls, names: Iterable[str]) -> Keywords:
        """All of these are the vision part, frozen or trained as a whole; the rest is the language model."""
        return cls(tuple(names))


LLAVA = Keywords(("vision_tower",), ("multi_modal_projector",), ("language_model", "lm_head"))
"""Of a composed model, and of most that are laid out as LLaVA's."""

PART_OF = {
    "vision_encoder": "vision_tower",
    "vision_projector": "projector",
    "others": "projector",
    "language_model": "language_model",
}
"""Field of `Keywords` -> part of the model, as logs and tables call it; the head is a part of its own."""

PARTS = ("vision_tower", "projector", "language_model", "lm_head")


def group_of(name: str, keywords: Keywords) -> str:
    """The field of `Keywords` that a parameter belongs to.

    Raises:
        UserError: none or several of the keywords begin its name.
    """
    found = _fitting(name, keywords)
    if not found and not keywords.language_model:
        return "language_model"
    if len(found) != 1:
        raise UserError(
            f"Parameter {name} fits {len(found)} of the keywords that say where the model's parts are "
            f"({', '.join(keyword for _, keyword in found) or 'none'}); it has to fit one."
        )
    return found[0][0]


def group_names(names: Iterable[str], keywords: Keywords) -> dict[str, list[str]]:
    """Parameter names by field of `Keywords`, every field in it. Raises UserError: see `group_of`."""
    groups: dict[str, list[str]] = {group: [] for group in Keywords._fields}
    for name in names:
        groups[group_of(name, keywords)].append(name)
    return groups


def parts_of(model: Any, keywords: Keywords) -> dict[str, nn.ModuleList]:
    """The parts of a model: for each of `PARTS` the largest modules that belong to it as a whole, in their order.

    A parameter that lies beside modules of other parts is a list of itself alone. The head shares its parameter with
    the language model where it is the embedding itself; every other parameter is in exactly one part.

    Args:
        model: a Hugging Face model, or one with its `get_output_embeddings`.
        keywords: of its architecture.

    Raises:
        UserError: a parameter fits none or several of the keywords, or a keyword of the vision encoder fits nothing.
    """
    parts: dict[str, nn.ModuleList] = {part: nn.ModuleList() for part in PARTS}
    _check_encoder(model, keywords)
    _place(model, "", keywords, model.get_output_embeddings(), parts)
    return parts


def covering(model: nn.Module, parameters: Iterable[nn.Parameter]) -> list[str]:
    """Names of the largest modules, and of single parameters, that hold the given parameters and no others."""
    wanted = {id(parameter) for parameter in parameters}

    def walk(module: nn.Module, prefix: str) -> Iterator[str]:
        below = list(module.parameters())
        if below and all(id(parameter) in wanted for parameter in below):
            yield prefix.removesuffix(".")
            return
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in wanted:
                yield prefix + name
        for name, child in module.named_children():
            yield from walk(child, f"{prefix}{name}.")

    return list(walk(model, ""))


def _place(module: nn.Module, name: str, keywords: Keywords, head: nn.Module, parts: dict[str, nn.ModuleList]) -> None:
    """Puts a module into the part that all of it belongs to, or else what it holds, one by one."""
    if module is head:
        parts["lm_head"].append(module)
        return
    names = [path for path, _ in module.named_parameters(name, remove_duplicate=False)]
    owners = {PART_OF[group_of(path, keywords)] for path in names}
    if not names:  # a projector that is the identity
        owners = {PART_OF[group] for group, _ in _fitting(name, keywords)}
    if len(owners) == 1 and all(child is not head for child in module.modules()):
        parts[owners.pop()].append(module)
        return
    for path, parameter in module.named_parameters(name, recurse=False):
        parts[PART_OF[group_of(path, keywords)]].append(nn.ParameterList([parameter]))
    for path, child in module.named_children():
        _place(child, f"{name}.{path}".lstrip("."), keywords, head, parts)


def _fitting(name: str, keywords: Keywords) -> list[tuple[str, str]]:
    """(field, keyword) of every keyword that begins a name."""
    components = name.removeprefix("model.").split(".")
    return [
        (group, keyword)
        for group, words in keywords._asdict().items()
        for keyword in words
        if components[: keyword.count(".") + 1] == keyword.split(".")
    ]


def _check_encoder(model: Any, keywords: Keywords) -> None:
    """Raises UserError for a keyword without a parameter: what it should have frozen would train."""
    names = [name for name, _ in model.named_parameters()]
    fitting = {keyword for name in names for _, keyword in _fitting(name, keywords)}
    missing = [keyword for keyword in keywords.vision_encoder if keyword not in fitting]
    if missing:
        known = sorted({name.removeprefix("model.").split(".")[0] for name in names})
        raise UserError(
            f"No parameter of {type(model).__name__} begins with {', '.join(missing)}, where its vision encoder should "
            f"be. Its parameters begin with: {', '.join(known)}."
        )
