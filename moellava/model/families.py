# SPDX-License-Identifier: Apache-2.0
"""What differs between language models, as data: one `Family` each, registered by a file of `language_model/`.

A family says how a checkpoint of its own format (the base model's, or one that LLaVA or MoE-LLaVA wrote around it)
reads as a Hugging Face causal language model: which fields its config becomes, and how its tensors are called there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from moellava.errors import UnknownNameError, UserError
from moellava.model.section import section_of
from moellava.registry import Registry


def unscaled(raw: Mapping[str, Any]) -> float:
    """The factor of a rule whose numbers stay as they are."""
    return 1.0


@dataclass(frozen=True)
class KeyRule:
    """One renaming between a family's own tensor names and Hugging Face's, good in both directions.

    `*` stands for one dotted part and `**` for the rest; they match in order on both sides.

    Args:
        theirs: name in the family's own format, `transformer.h.*.mlp.w1.**`.
        ours: name in Hugging Face's causal language model. Several names mean that their tensor is ours joined along
            dimension 0, in equal parts.
        scale: (their config) -> the factor from their number to ours.
    """

    theirs: str
    ours: tuple[str, ...]
    scale: Callable[[Mapping[str, Any]], float] = unscaled

    @cached_property
    def their_pattern(self) -> re.Pattern[str]:
        return _pattern(self.theirs)

    @cached_property
    def our_patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(_pattern(name) for name in self.ours)


def _pattern(name: str) -> re.Pattern[str]:
    escaped = re.escape(name).replace(r"\*\*", "(.+)").replace(r"\*", r"([^.]+)")
    return re.compile(escaped)


def fill(name: str, parts: tuple[str, ...]) -> str:
    """Puts `parts` in place of the stars of `name`, in order."""
    values = iter(parts)
    return re.sub(r"\*\*?", lambda _: next(values), name)


def same_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config conversion of a family whose own config is Hugging Face's."""
    return dict(raw)


@dataclass(frozen=True)
class Family:
    """A family of language models.

    Args:
        name: key in `FAMILIES`.
        text_model_type: `model_type` of the Hugging Face config that carries it in a composed model.
        base_model_types: `model_type`s of base checkpoints that it reads.
        published_types: what follows `llava_` or `moe_llava_` in the `model_type` of published checkpoints.
        marks: config fields that only this family's raw configs have, where two families share a `model_type`.
        version: the conversation template that goes with its tokenizer.
        text_config: raw config -> fields of the Hugging Face config (further fields are dropped).
        their_config: the inverse: Hugging Face fields -> the family's own, for folders that are written.
        layers: what the decoder layers are called in the family's own format.
        rules: tensors that are called or cut differently; all others keep their names.
        published_text_config: the same for published checkpoints, where it differs from `text_config`.
    """

    name: str
    text_model_type: str
    base_model_types: tuple[str, ...]
    published_types: tuple[str, ...]
    version: str
    text_config: Callable[[Mapping[str, Any]], dict[str, Any]] = same_fields
    published_text_config: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    their_config: Callable[[Mapping[str, Any]], dict[str, Any]] = same_fields
    layers: str = "model.layers"
    rules: tuple[KeyRule, ...] = ()
    marks: tuple[str, ...] = field(default=())

    def to_ours(self, key: str, tensor: torch.Tensor, raw: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """One tensor of the family's own format -> the Hugging Face causal language model's names and numbers."""
        for rule in self.rules:
            match = rule.their_pattern.fullmatch(key)
            if match:
                scale = rule.scale(raw)
                tensor = tensor if scale == 1.0 else tensor * scale
                pieces = tensor.chunk(len(rule.ours), dim=0)
                return {fill(name, match.groups()): piece for name, piece in zip(rule.ours, pieces, strict=True)}
        return {key: tensor}

    def to_theirs(self, state: Mapping[str, torch.Tensor], raw: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """A Hugging Face causal language model's tensors -> the family's own format (the inverse of `to_ours`)."""
        result: dict[str, torch.Tensor] = {}
        for key, tensor in state.items():
            rule, match = self._rule_of(key)
            if rule is None or match is None:
                result[key] = tensor
                continue
            parts = [state[fill(name, match.groups())] for name in rule.ours]
            joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=0)
            scale = rule.scale(raw)
            result[fill(rule.theirs, match.groups())] = joined if scale == 1.0 else joined / scale
        return result

    def _rule_of(self, key: str) -> tuple[KeyRule | None, re.Match[str] | None]:
        for rule in self.rules:
            for pattern in rule.our_patterns:
                match = pattern.fullmatch(key)
                if match:
                    return rule, match
        return None, None


FAMILIES: Registry[Family] = Registry("language model family")


def family_of(config: Any) -> Family:
    """The family of a composed model, a language model or a raw config.

    Args:
        config: a Hugging Face config (`LlavaConfig`, `Qwen2Config` …), a model that has one, or a config.json.

    Raises:
        UnknownNameError: no family reads such a model; the known ones are listed.
    """
    config = getattr(config, "config", config)
    raw = config if isinstance(config, Mapping) else config.to_dict()
    section = section_of(raw)
    if section is not None and section.family is not None:
        return FAMILIES[section.family]
    text = raw.get("text_config") or raw
    return base_family(text)


def registered_family(raw: Mapping[str, Any]) -> Family | None:
    """The family whose base checkpoints have this `config.json`; None: it is of no family, and its own class reads it.

    Raises:
        UserError: the file names no `model_type`.
    """
    model_type = raw.get("model_type")
    if not model_type:
        raise UserError("The language model's config.json names no model_type, so its family is unknown.")
    return next((family for family in FAMILIES.values() if model_type in family.base_model_types), None)


def base_family(raw: Mapping[str, Any]) -> Family:
    """The family that reads a base language model with this `config.json`.

    Raises:
        UserError: the file names no `model_type`.
        UnknownNameError: no family reads such a model; the known ones are listed.
    """
    model_type, family = raw.get("model_type"), registered_family(raw)
    if family is not None:
        return family
    for family in FAMILIES.values():
        if model_type == family.text_model_type:
            return family
    known = ", ".join(sorted({name for family in FAMILIES.values() for name in family.base_model_types}))
    raise UnknownNameError(f"No language model family reads model_type {model_type!r}. Known: {known}")


def published_family(raw: Mapping[str, Any]) -> Family:
    """The family of a folder that LLaVA or MoE-LLaVA wrote.

    Raises:
        UnknownNameError: no family reads such a checkpoint; the known ones are listed.
    """
    published = re.sub(r"^(moe_)?llava_?", "", raw.get("model_type", "")) or "llama"
    fitting = [family for family in FAMILIES.values() if published in family.published_types]
    marked = [family for family in fitting if family.marks and all(mark in raw for mark in family.marks)]
    unmarked = [family for family in fitting if not family.marks]
    if marked or unmarked:
        return (marked or unmarked)[0]
    known = ", ".join(sorted({name for family in FAMILIES.values() for name in family.published_types}))
    raise UnknownNameError(
        f"No language model family reads published checkpoints of model_type {raw.get('model_type')!r}. "
        f"Known after 'llava_' or 'moe_llava_': {known}"
    )
