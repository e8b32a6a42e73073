"""The released models that are known by an id, and where the parts of each family are.

A model of a known kind is one row more in `released_models.py`, or one `register_model(…)` in a program of your own
(docs/ADD_A_MODEL.md); a local folder of one needs neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from moellava.errors import UnknownNameError, UserError
from moellava.lmm.released_models import RELEASED_MODELS
from moellava.registry import Registry


class Keywords(NamedTuple):
    """Where the parts of a family's model are: beginnings of parameter names, without the leading `model.`.

    Every parameter begins with exactly one of them. Whole name components are compared.

    Attributes:
        vision_encoder: what turns pixels into features.
        vision_projector: what turns features into embeddings of the language model.
        language_model: embeddings, decoder and head.
        others: parameters of no part; they train with the projector.
    """

    vision_encoder: tuple[str, ...]
    vision_projector: tuple[str, ...]
    language_model: tuple[str, ...]
    others: tuple[str, ...] = ()


_LLAVA = Keywords(("vision_tower",), ("multi_modal_projector",), ("language_model", "lm_head"))
_LLAVA_NEXT = _LLAVA._replace(others=("image_newline",))
_QWEN_VL = Keywords(("visual.patch_embed", "visual.blocks"), ("visual.merger",), ("language_model", "lm_head"))

MULTIMODAL_KEYWORDS: dict[str, Keywords] = {
    "llava-1.5": _LLAVA,
    "llava-1.6": _LLAVA_NEXT,
    "llava-interleave": _LLAVA,
    "llava-next-video": _LLAVA_NEXT,
    "llava-onevision": _LLAVA_NEXT,
    "qwen2-vl": _QWEN_VL,
    "qwen2.5-vl": _QWEN_VL,
    "qwen3-vl": _QWEN_VL._replace(
        vision_encoder=("visual.patch_embed", "visual.pos_embed", "visual.blocks"),
        vision_projector=("visual.merger", "visual.deepstack_merger_list"),
    ),
    "llama-3.2-vision": _LLAVA._replace(vision_encoder=("vision_model",)),
    "internvl": _LLAVA,
    "smolvlm": Keywords(("vision_model",), ("connector",), ("text_model", "lm_head")),
    "gemma3": _LLAVA,
    "paligemma": _LLAVA,
    "phi3-v": Keywords(
        ("vision_embed_tokens.img_processor",),
        ("vision_embed_tokens.img_projection",),
        ("embed_tokens", "layers", "norm", "lm_head"),
        ("vision_embed_tokens.glb_GN", "vision_embed_tokens.sub_GN"),
    ),
    "qwen-vl": Keywords(
        tuple(
            f"transformer.visual.{part}"
            for part in ("conv1", "positional_embedding", "ln_pre", "transformer", "ln_post")
        ),
        ("transformer.visual.attn_pool", "transformer.visual.proj"),
        ("transformer.wte", "transformer.h", "transformer.ln_f", "lm_head"),
    ),
}
"""Model family id -> where its parts are."""


@dataclass(frozen=True)
class LMMFamily:
    """Models that share an architecture.

    Args:
        family_id: key in `LMM_FAMILIES` and `MULTIMODAL_KEYWORDS`.
        model_type: `model_type` of its config.json.
        text_model_types: `model_type`s of its text config, where two families share a `model_type`; () for any.
        remote_code: whether transformers lacks its class, so that the code in the model's own repository has to run.
        needs: fields of its config.json that tell it from a language model of the same `model_type`.
    """

    family_id: str
    model_type: str
    text_model_types: tuple[str, ...] = ()
    remote_code: bool = False
    needs: tuple[str, ...] = ()

    @property
    def keywords(self) -> Keywords:
        """Where its parts are."""
        return MULTIMODAL_KEYWORDS[self.family_id]

    def fits(self, raw: Mapping[str, Any]) -> bool:
        """Whether a config.json is one of this family."""
        if any(name not in raw for name in self.needs):
            return False
        text_type = (raw.get("text_config") or {}).get("model_type")
        if self.text_model_types and text_type not in self.text_model_types:
            return False
        return raw.get("model_type") == self.model_type


@dataclass(frozen=True)
class SupportedModel:
    """A released model.

    Args:
        model_id: what `--model_id` takes.
        family: its architecture.
        model_hf_path: where the hub keeps it.
    """

    model_id: str
    family: LMMFamily
    model_hf_path: str


LMM_FAMILIES: Registry[LMMFamily] = Registry("model family")
SUPPORTED_MODELS: Registry[SupportedModel] = Registry("model id")


def register_family(family: LMMFamily) -> LMMFamily:
    """Adds a family. Raises ValueError if its id is taken or `MULTIMODAL_KEYWORDS` lacks it."""
    if family.family_id not in MULTIMODAL_KEYWORDS:
        raise ValueError(f"model family {family.family_id!r} has no entry in MULTIMODAL_KEYWORDS")
    return LMM_FAMILIES.register(family.family_id, family)


def register_model(*, model_id: str, model_family_id: str, model_hf_path: str) -> SupportedModel:
    """Adds a released model.

    Raises:
        ValueError: the id is taken.
        UnknownNameError: no such family; the known ones are listed.
    """
    return SUPPORTED_MODELS.register(model_id, SupportedModel(model_id, LMM_FAMILIES[model_family_id], model_hf_path))


def lmm_family_of(raw: Mapping[str, Any], source: str = "this folder") -> LMMFamily:
    """The family of a model, from its config.json.

    Args:
        raw: the file's content; of a sparse folder of ours too, whose `model_type` is in disguise.
        source: where it comes from, for the message.

    Raises:
        UnknownNameError: no family is of this kind; the known kinds are listed.
    """
    plain = undisguised(raw)
    for family in LMM_FAMILIES.values():
        if family.fits(plain):
            return family
    known = ", ".join(sorted({family.model_type for family in LMM_FAMILIES.values()}))
    raise UnknownNameError(
        f"{source} is a model of type {plain.get('model_type')!r}, which no family of moellava is. Known: {known}. "
        "docs/ADD_A_MODEL.md says how one joins."
    )


def undisguised(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the `model_type`s that its Hugging Face class has."""
    plain = dict(raw)
    plain["model_type"] = str(plain.get("model_type", "")).removeprefix("moellava_")
    if isinstance(plain.get("text_config"), Mapping):
        plain["text_config"] = undisguised(plain["text_config"])
    return plain


def refuse_upcycling(family: LMMFamily, flag: str) -> None:
    """Raises UserError for a family whose MLPs are not known here; `flag` is what asked for it, or for the model."""
    if family.remote_code:
        raise UserError(
            f"{flag}: the decoder of {family.family_id} models is code in their own repository, whose MLPs are not "
            "known here: it cannot be upcycled."
        )


def group_of(name: str, keywords: Keywords) -> str:
    """The part of the model that a parameter belongs to: a field of `Keywords`.

    Raises:
        UserError: none or several of the family's keywords begin its name.
    """
    components = name.removeprefix("model.").split(".")
    found = [
        (group, keyword)
        for group, words in keywords._asdict().items()
        for keyword in words
        if components[: keyword.count(".") + 1] == keyword.split(".")
    ]
    if len(found) != 1:
        raise UserError(
            f"Parameter {name} fits {len(found)} entries of MULTIMODAL_KEYWORDS "
            f"({', '.join(keyword for _, keyword in found) or 'none'}); it has to fit one."
        )
    return found[0][0]


def group_names(names: Iterable[str], keywords: Keywords) -> dict[str, list[str]]:
    """Parameter names by part, every part of `Keywords` in it. Raises UserError as `group_of` does."""
    groups: dict[str, list[str]] = {group: [] for group in Keywords._fields}
    for name in names:
        groups[group_of(name, keywords)].append(name)
    return groups


for _family in (
    LMMFamily("llava-1.5", "llava", ("llama", "mistral")),
    LMMFamily("llava-1.6", "llava_next"),
    LMMFamily("llava-interleave", "llava", ("qwen2",)),
    LMMFamily("llava-next-video", "llava_next_video"),
    LMMFamily("llava-onevision", "llava_onevision"),
    LMMFamily("qwen2-vl", "qwen2_vl"),
    LMMFamily("qwen2.5-vl", "qwen2_5_vl"),
    LMMFamily("llama-3.2-vision", "mllama"),
    LMMFamily("phi3-v", "phi3_v", remote_code=True),
    LMMFamily("qwen-vl", "qwen", remote_code=True, needs=("visual",)),
    LMMFamily("qwen3-vl", "qwen3_vl"),
    LMMFamily("internvl", "internvl"),
    LMMFamily("smolvlm", "smolvlm"),
    LMMFamily("gemma3", "gemma3"),
    LMMFamily("paligemma", "paligemma"),
):
    register_family(_family)

for _family_id, _models in RELEASED_MODELS.items():
    for _model_id, _path in _models.items():
        register_model(model_id=_model_id, model_family_id=_family_id, model_hf_path=_path)
