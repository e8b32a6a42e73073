# SPDX-License-Identifier: Apache-2.0
"""What Hugging Face's classes lack, as a subclass of any of them: MoE layers, other projectors, towers and heads.

An extended folder must not open silently wrong in plain transformers, which would drop the weights that it does not
know. So its `config.json` gives `moellava_…` for the `model_type` of the model **and** of its text config: the Auto
classes do not know the first, and `LlavaForConditionalGeneration.from_pretrained` stops at the second.
"""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)

from moellava.auto_classes import PREFIX
from moellava.errors import UserError
from moellava.model.joined_towers import JoinedTowersConfig
from moellava.model.projectors import ProjectorSpec, parse_projector
from moellava.model.section import Section, section_of
from moellava.model.towers import projector_sizes
from moellava.moe import MoESpec, upcycle

REMOTE = "remote_"
"""The same before the text config's `model_type` of folders that `moellava export` writes with a file of code."""

NAMED = "Extended"
"""What the names of extended classes begin with."""


class ExtendedConfig:
    """Mixed into a config class: disguises itself when it is written, and is itself again when it is read."""

    model_type: ClassVar[str]

    def to_json_string(self, use_diff: bool = True) -> str:
        """As Hugging Face's, with the text config's `model_type` disguised."""
        content = json.loads(super().to_json_string(use_diff=use_diff))  # type: ignore[misc]
        text = content.get("text_config")
        if text is not None and not text["model_type"].startswith(PREFIX):
            text["model_type"] = PREFIX + text["model_type"]
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As Hugging Face's, for a config in disguise or not."""
        content = copy.deepcopy(config_dict)
        if isinstance(content.get("text_config"), dict):
            content["text_config"]["model_type"] = content["text_config"]["model_type"].removeprefix(PREFIX)
        content["model_type"] = cls.model_type
        return super().from_dict(content, **kwargs)  # type: ignore[misc]


@dataclass(frozen=True)
class Extension:
    """What a config asks for beyond Hugging Face's class.

    Args:
        projector: one that is more than two linear layers.
        head_bias: whether the language-model head has a bias.
        softcap: see `CappedHead`; None: the logits are not capped.
        towers: of towers that Hugging Face's class reads otherwise.
        moe: the options of its MoE layers.
    """

    projector: ProjectorSpec | None = None
    head_bias: bool = False
    softcap: float | None = None
    towers: JoinedTowersConfig | None = None
    moe: MoESpec | None = None

    @property
    def reasons(self) -> list[str]:
        """Why plain transformers cannot hold this model; empty if it can."""
        found = []
        if self.moe is not None:
            found.append("its decoder has Mixture-of-Experts layers")
        if self.head_bias:
            found.append("its language-model head has a bias, which LlavaForConditionalGeneration lacks")
        if self.softcap is not None:
            found.append(f"its logits are capped at {self.softcap}, which LlavaForConditionalGeneration does not do")
        if self.towers is not None:
            found.append(self.towers.reason)
        if self.projector is not None:
            found.append(f"its projector is {self.projector.name}, which LlavaForConditionalGeneration lacks")
        return found


def extension_of(config: PretrainedConfig) -> Extension:
    """What a config, of any class, asks for."""
    section = section_of(config) or Section()
    named = section.image_projector_type
    projector = None if named is None else parse_projector(named)
    moe, vision = getattr(config, "moe", None), getattr(config, "vision_config", None)
    return Extension(
        projector=projector if projector is not None and projector.is_extended else None,
        head_bias=section.head_bias,
        softcap=section.softcap,
        towers=vision if isinstance(vision, JoinedTowersConfig) else None,
        moe=MoESpec.from_config(moe) if moe else None,
    )


class CappedHead(nn.Linear):
    """A head whose logits are s · tanh(logits / s) (Gemma 2, arXiv:2408.00118, section 2).

    Args:
        linear: the plain head; its parameters become this one's.
        softcap: s.
    """

    def __init__(self, linear: nn.Linear, softcap: float):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias, self.softcap = linear.weight, linear.bias, softcap

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[…, D] -> [..., V]."""
        return self.softcap * torch.tanh(super().forward(hidden) / self.softcap)


class ExtendedModel:
    """Mixed into a model class: builds Hugging Face's structure, then what the config asks for beyond it."""

    model: Any
    config: Any

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        asked = extension_of(config)
        if asked.projector is not None:
            sizes = projector_sizes(
                config.vision_config, config.text_config.hidden_size, config.vision_feature_select_strategy
            )
            self.model.multi_modal_projector = asked.projector.module(sizes)
        if asked.head_bias:
            self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=True)
        if asked.softcap is not None:
            self.lm_head = CappedHead(self.lm_head, asked.softcap)
        if asked.moe is not None:
            upcycle(self, asked.moe, initialize=False)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: for what it takes for code from elsewhere, transformers does not compute the constants that modules
        keep for their children (Falcon-H1's multipliers), and they would be whatever lies in memory."""
        return False

    def set_output_embeddings(self, head: nn.Linear) -> None:
        """As Hugging Face's, which hands in a plain layer when the vocabulary grows."""
        softcap = extension_of(self.config).softcap
        super().set_output_embeddings(head if softcap is None else CappedHead(head, softcap))  # type: ignore[misc]


@functools.cache
def extended_config(base: Any) -> Any:
    """The config class of the extended `base`."""
    name = NAMED + base.__name__
    return type(name, (ExtendedConfig, base), {"model_type": PREFIX + base.model_type, "__module__": __name__})


@functools.cache
def extended_class(base: Any) -> Any:
    """The class that holds `base` and what the config asks for beyond it."""
    config_class = extended_config(base.config_class)
    attributes = {"config_class": config_class, "config": None, "__module__": __name__}
    return type(NAMED + base.__name__, (ExtendedModel, base), attributes)


def __getattr__(name: str) -> Any:
    """The extended class of a name, made anew where it has not been yet: pickles find their classes so."""
    base = getattr(transformers, name.removeprefix(NAMED), None) if name.startswith(NAMED) else None
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return extended_config(base) if issubclass(base, PretrainedConfig) else extended_class(base)


def model_class(config: PretrainedConfig, base: Any = LlavaForConditionalGeneration) -> Any:
    """`base`, or its extended class where the config asks for more than `base` holds."""
    return extended_class(base) if extension_of(config).reasons else base


def as_extended(config: PretrainedConfig) -> PretrainedConfig:
    """The same config as an instance of its extended class (itself if it is one)."""
    if isinstance(config, ExtendedConfig):
        return config
    base: Any = type(config)
    return extended_config(base).from_dict(config.to_dict())


def extend_in_place(model: PreTrainedModel) -> None:
    """Makes a model that was upcycled after it was built know that it is an extended one."""
    if isinstance(model, ExtendedModel):
        return
    base: Any = type(model)
    model.__class__ = extended_class(base)
    model.config = as_extended(model.config)


def base_of(model_type: str) -> Any:
    """The Hugging Face class of a folder, which an extended one extends, from the `model_type` of its config."""
    plain = model_type.removeprefix(PREFIX)
    if plain not in CONFIG_MAPPING or CONFIG_MAPPING[plain] not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UserError(
            f"This folder holds a {plain!r} model, and the installed transformers has no class of that type for images "
            "and text."
        )
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[CONFIG_MAPPING[plain]]
