# SPDX-License-Identifier: Apache-2.0
"""Flags and folder, brought together: what the user gave acts, or is refused by name; else the folder decides.

The order is: what was given, what the folder says, what fits the family, the default. The log says what was decided.
"""

from __future__ import annotations

from typing import Any

from moellava.data.tokenizer_facts import PLAIN, facts_of, fit_of, fitting_version
from moellava.errors import UserError
from moellava.log import get_logger
from moellava.model.families import FAMILIES
from moellava.model.tiles import parse_pinpoints
from moellava.model.tower_images import canvas_of
from moellava.model.towers import selected_features
from moellava.moe import MoESpec, change_spec
from moellava.moe.own_routers import balance_of, has_own_experts
from moellava.train.arguments import DataArguments, ModelArguments, MoEArguments
from moellava.train.conflicts import OWN_BALANCE
from moellava.train.stages import PRETRAIN, Stage
from moellava.vlm import VLM

logger = get_logger(__name__)


def reconcile(vlm: VLM, stage: Stage, model_args: ModelArguments, data_args: DataArguments) -> None:
    """Gives a model that was opened the template and the image shape that the flags name, or leaves its own.

    Raises:
        UserError: a template that does not fit, or a flag that says otherwise than the folder of what cannot change.
    """
    vlm.require_tokenizer()
    for flag, given, own in composition(vlm, model_args, data_args):
        if given not in (None, own):
            raise UserError(
                f"--{flag} {given}, but {vlm.source} was put together with "
                f"{'parts of its own' if own is None else own}. Leave the flag out: the folder says it."
            )
    section = vlm.section
    if vlm.architecture is not None and data_args.image_aspect_ratio is not None:
        raise UserError(
            f"--image_aspect_ratio {data_args.image_aspect_ratio}: {vlm.source} is a released model, whose processor "
            "says how images are cut. Leave the flag out."
        )
    follows = next_template(vlm, stage)
    version = model_args.version or follows or section.version
    if model_args.version is not None:
        refuse_template(vlm, stage, model_args, follows or section.version)
    origin = "--version" if model_args.version else "which goes with its language model" if follows else "the folder's"
    vlm.settle(version, data_args.image_aspect_ratio)
    logger.info("Template %s (%s), images %s", version, origin, vlm.section.image_aspect_ratio)


def composition(vlm: VLM, model_args: ModelArguments, data_args: DataArguments) -> list[tuple[str, Any, Any]]:
    """(flag, what was given, what the model was put together with) of what stays as it is."""
    section, config = vlm.section, vlm.model.config
    given = model_args.mm_vision_select_feature
    features = selected_features(config) if hasattr(config, "vision_feature_select_strategy") else (None,)
    grids: Any = getattr(config, "image_grid_pinpoints", None)
    asked: Any = data_args.image_grid_pinpoints
    if asked is not None and grids is not None:
        asked = [list(pair) for pair in parse_pinpoints(asked, canvas_of(config.vision_config)[0])]
    return [
        ("image_grid_pinpoints", asked, grids),
        ("image_projector_type", model_args.image_projector_type, section.image_projector_type),
        ("mm_vision_select_layer", model_args.mm_vision_select_layer, getattr(config, "vision_feature_layer", None)),
        ("mm_vision_select_feature", given, given if given in features else features[0]),
        ("mm_use_im_start_end", model_args.mm_use_im_start_end, section.use_im_start_end),
    ]


def next_template(vlm: VLM, stage: Stage) -> str | None:
    """The template in place of stage 1's in the stages after it, and of another one in stage 1; None: it may stay."""
    if vlm.architecture is not None or (vlm.section.version == PLAIN) == (stage is PRETRAIN):
        return None
    if stage is PRETRAIN:
        return PLAIN
    family = vlm.section.family
    return fitting_version(vlm.tokenizer) if family is None else FAMILIES[family].version


def refuse_template(vlm: VLM, stage: Stage, model_args: ModelArguments, usual: str) -> None:
    """Raises UserError where --version names a template that fits neither the stage nor the tokenizer, unless it is
    forced.

    Args:
        usual: the template that is taken where none is named.
    """
    version = model_args.version
    if version is None or model_args.force_version or version == usual:
        return
    if (stage is PRETRAIN) != (version == PLAIN):
        takes = "stage 1 learns from captions, with plain" if stage is PRETRAIN else "plain is stage 1's, for captions"
        raise UserError(f"--version {version} does not fit: {takes}. Leave the flag out, or add --force_version True.")
    fit = fit_of(vlm.tokenizer, version)
    ends_with_text = fit.is_exact and "<" not in fit.terminator  # as the template means to
    if not fit.fits and not ends_with_text:
        names = [one.version for one in facts_of(vlm.tokenizer).fits if one.fits and one.version != PLAIN]
        raise UserError(
            f"--version {version} does not fit the tokenizer of {vlm.source}: {fit.verdict}. Templates that fit: "
            f"{', '.join(names) or 'none'}. Leave the flag out for {usual}, or add --force_version True."
        )


def own_balance_weight(vlm: VLM, stage: Stage, model_args: ModelArguments, moe_args: MoEArguments) -> float | None:
    """The weight that --router_aux_loss_coef gives the balancing loss of a language model with experts of its own.

    Raises:
        UserError: it is given, and nothing would read it: no experts, none that can be watched, or none that learn.
    """
    given = moe_args.given().get(OWN_BALANCE)
    if given is None:
        return None
    flag = f"--{OWN_BALANCE} {given:g}"
    if not has_own_experts(vlm.model):
        raise UserError(
            f"{flag} needs --moe_enable True: the language model of {vlm.source} has no experts of its own, and "
            "nothing would read the flag."
        )
    if stage is PRETRAIN or model_args.freeze_backbone:
        frozen = "--tune_mm_mlp_adapter True" if stage is PRETRAIN else "--freeze_backbone True"
        raise UserError(f"{flag}: the language model, whose experts it would balance, is frozen by {frozen}.")
    if balance_of(vlm.model.get_decoder(), given) is None:
        raise UserError(
            f"{flag}: the experts in the language model of {vlm.source} have no routers that tell their logits, so "
            "they cannot be balanced. Leave the flag out."
        )
    return given


def routing_of(stored: MoESpec, moe_args: MoEArguments) -> MoESpec:
    """The options that a sparse folder is trained on with. Raises UserError: see `MoESpec.changed`."""
    spec = stored.changed(**moe_args.given())
    for name, value in spec.to_config().items():
        own = stored.to_config()[name]
        if value != own:
            logger.info("Routing: %s %s, which was %s in the folder", name, value, own)
    return spec


def retrain(vlm: VLM, moe_args: MoEArguments) -> None:
    """Gives a sparse model the routing and loss options that were given anew; they are saved with it."""
    assert vlm.spec is not None
    spec = routing_of(vlm.spec, moe_args)
    change_spec(vlm.model, spec)
    vlm.model.config.moe = spec.to_config()
