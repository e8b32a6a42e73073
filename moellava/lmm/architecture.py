# SPDX-License-Identifier: Apache-2.0
"""What a released architecture is, as data: one `Architecture` each, registered by a file of `architectures/`.

A model of a known architecture is one more row of its `models`, or one `register_model(…)` in a program of your own
(docs/ADD_A_MODEL.md); a local folder of one needs neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from moellava.auto_classes import PREFIX
from moellava.data.frame_processors import FrameRecipe
from moellava.errors import UnknownNameError, UserError
from moellava.model.manifest import VLM, Manifest
from moellava.model.parts import Keywords
from moellava.registry import Registry

Template = str | Callable[[str, Collection[str]], str]
"""A chat template in Jinja; or what chooses one by the `model_type` of the language model, which may differ between
models of one architecture, and the special tokens of the tokenizer, which tell apart what shares a `model_type`."""


@dataclass(frozen=True)
class Architecture:
    """Released models of one class.

    Args:
        name: key in `ARCHITECTURES`.
        keywords: where its parts are; a plain list of names means that these are the vision part, and all else the
            language model. None: probes find them.
        model_type: `model_type` of its config.json. None, of one that is registered while a program runs: what the
            folder says, which has to be a class of transformers for images and text.
        text_model_types: `model_type`s of its text config, where two architectures share a `model_type`; () for any.
        needs: fields of its config.json that tell it from a language model of the same `model_type`.
        models: id -> where the hub keeps it.
        template: the chat template on record, for folders without one that can be trained on: over messages whose
            content is a list of images, videos and texts.
        loads_images: whether its collator gets images; False: their paths, which its tokenizer reads in the prompt.
        load: (folder, config, dtype) -> its model; None: as its class is opened, by `moellava.model.build.read`.
        collator: a subclass of `MediaCollator`; None: that one.
        video: what its video processor does to frames where torchvision is not installed; None: there it sees a video
            as images.
        remote_processor: (folder, config.json) -> its processor, where transformers lacks the class, so that the
            code in the model's own repository has to run; None: transformers has it.
    """

    name: str
    keywords: Keywords | None
    model_type: str | None = None
    text_model_types: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    models: Mapping[str, str] = field(default_factory=dict)
    template: Template | None = None
    loads_images: bool = True
    load: Callable[..., Any] | None = None
    collator: type[Any] | None = None
    video: FrameRecipe | None = None
    remote_processor: Callable[[Path, dict[str, Any]], Any] | None = None

    def __post_init__(self) -> None:
        if self.keywords is not None and not isinstance(self.keywords, Keywords):
            object.__setattr__(self, "keywords", Keywords.of_vision(self.keywords))

    @property
    def remote_code(self) -> bool:
        """Whether the Python files beside its weights have to run."""
        return self.remote_processor is not None

    def refuse_upcycling(self, flag: str) -> None:
        """Raises UserError where the MLPs are not known here; `flag` is what asked for it, or for the model."""
        if self.remote_code:
            raise UserError(
                f"{flag}: the decoder of {self.name} models is code of their own, whose MLPs are not known here: it "
                "cannot be upcycled."
            )

    def fits(self, raw: Mapping[str, Any]) -> bool:
        """Whether a config.json is one of this architecture."""
        if any(name not in raw for name in self.needs):
            return False
        text_type = (raw.get("text_config") or {}).get("model_type")
        if self.text_model_types and text_type not in self.text_model_types:
            return False
        return raw.get("model_type") == self.model_type

    def template_for(self, text_model_type: str, special: Collection[str] = ()) -> str | None:
        """The chat template on record for a model, None if there is none; arguments: see `Template`."""
        return self.template(text_model_type, special) if callable(self.template) else self.template


@dataclass(frozen=True)
class SupportedModel:
    """A released model.

    Args:
        model_id: what `--model_id` takes.
        family_id: name of its architecture.
        model_hf_path: where the hub keeps it.
    """

    model_id: str
    family_id: str
    model_hf_path: str

    @property
    def architecture(self) -> Architecture:
        """Its entry, as it is now."""
        return ARCHITECTURES[self.family_id]


COMPOSED_TYPE = "llava"
"""`model_type` of what is composed of a language model and a tower."""

ARCHITECTURES: Registry[Architecture] = Registry("architecture")
SUPPORTED_MODELS: Registry[SupportedModel] = Registry("model id")


def register_architecture(architecture: Architecture) -> Architecture:
    """Adds an architecture and its models. Raises ValueError if its name or the id of a model is taken."""
    ARCHITECTURES.register(architecture.name, architecture)
    for model_id, path in architecture.models.items():
        SUPPORTED_MODELS.register(model_id, SupportedModel(model_id, architecture.name, path))
    return architecture


def register_model(*, model_id: str, model_family_id: str, model_hf_path: str) -> SupportedModel:
    """Adds a released model to its architecture's.

    Raises:
        ValueError: the id is taken.
        UnknownNameError: no such architecture; the known ones are listed.
    """
    architecture = ARCHITECTURES[model_family_id]
    added = SUPPORTED_MODELS.register(model_id, SupportedModel(model_id, model_family_id, model_hf_path))
    models = {**architecture.models, model_id: model_hf_path}
    ARCHITECTURES.replace(model_family_id, dataclasses.replace(architecture, models=models))
    return added


class FieldView(Mapping[str, Any]):
    """One field of every architecture, by name: what docs/ADD_A_MODEL.md calls MULTIMODAL_KEYWORDS, LOADERS and so on.

    `view[name] = value` changes that field of the architecture's entry.

    Args:
        field_name: of `Architecture`.
        default: what an entry means that has None there.
        begins: whether writing a name that is unknown begins an entry of that name.
    """

    def __init__(self, field_name: str, default: Any = None, begins: bool = False):
        self.field_name = field_name
        self.default = default
        self.begins = begins

    def __getitem__(self, name: str) -> Any:
        value = getattr(ARCHITECTURES[name], self.field_name)
        return self.default if value is None else value

    def __setitem__(self, name: str, value: Any) -> None:
        changed = {self.field_name: value}
        if self.begins and name not in ARCHITECTURES:
            register_architecture(Architecture(name, **changed))
        else:
            ARCHITECTURES.replace(name, dataclasses.replace(ARCHITECTURES[name], **changed))

    def __iter__(self) -> Iterator[str]:
        return iter(ARCHITECTURES)

    def __len__(self) -> int:
        return len(ARCHITECTURES)


def architecture_of(manifest: Manifest) -> Architecture | None:
    """The architecture of a folder's model: the registered one, by what the folder says or by its config, or one that
    probes have to fill in; None for what is composed of a language model and a tower, here or by other code that writes
    Hugging Face's LLaVA.

    Raises:
        UnknownNameError: it is of none that is registered, and transformers has no class for it; the known types are
            listed. Or it was trained as one that a program registered, which this one has not.
    """
    found, named = registered(manifest), manifest.section and manifest.section.architecture
    model_type = undisguised(manifest.config)["model_type"]
    is_composed = named is None and (manifest.section is not None or model_type == COMPOSED_TYPE)
    if found is not None or is_composed:
        return found
    if named in (None, model_type) and has_class(model_type):
        return Architecture(model_type, None, model_type)
    known = ", ".join(sorted({entry.model_type for entry in ARCHITECTURES.values() if entry.model_type}))
    says = f", and says that it is of {named!r}, which is not registered here" if named else ""
    raise UnknownNameError(
        f"{manifest.called} is a model of type {model_type!r}, which no architecture of "
        f"moellava is{says}. Known: {known}; and every type that the installed transformers has a class for images and "
        "text of. docs/ADD_A_MODEL.md says how one joins."
    )


def registered(manifest: Manifest) -> Architecture | None:
    """The entry that a folder says it is of, or else the one that its config fits; None if there is none."""
    named = manifest.section and manifest.section.architecture
    if manifest.is_published or (manifest.section is not None and named is None):
        return None
    if named in ARCHITECTURES:
        return ARCHITECTURES[str(named)]
    plain = undisguised(manifest.config)
    return next((architecture for architecture in ARCHITECTURES.values() if architecture.fits(plain)), None)


def holds_vlm(manifest: Manifest) -> bool:
    """Whether a folder is a vision-language model's. That of a registered architecture is, whatever its config.json
    has for fields."""
    return manifest.holds == VLM or registered(manifest) is not None or is_released(manifest)


def is_released(manifest: Manifest) -> bool:
    """Whether transformers opens the folder for images and text, and not as a language model or a tower."""
    model_type = undisguised(manifest.config)["model_type"]
    return has_class(model_type) and CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING


def has_class(model_type: str) -> bool:
    """Whether the installed transformers has a class for images and text of this type."""
    return model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def undisguised(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the `model_type`s that its Hugging Face class has."""
    plain = dict(raw)
    plain["model_type"] = str(plain.get("model_type", "")).removeprefix(PREFIX)
    if isinstance(plain.get("text_config"), Mapping):
        plain["text_config"] = undisguised(plain["text_config"])
    return plain
