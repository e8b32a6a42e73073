# SPDX-License-Identifier: Apache-2.0
"""The three stages as objects: what each trains, and which folder it starts from.

pretrain   language model + tower  ->  the projector learns (`--tune_mm_mlp_adapter True`)
finetune   + projector             ->  projector and language model learn
moe        a finetuned folder      ->  MLPs become MoE layers; experts and routers learn (`--moe_enable True`)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from moellava.errors import UserError
from moellava.moe import expert_parameters, moe_layers, router_parameters
from moellava.train.arguments import ModelArguments, MoEArguments
from moellava.vlm import VLM


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Args:
        name: what stands in logs and in the saved config.
        selects: (VLM, model arguments, MoE arguments) -> the parameters that train.
    """

    name: str
    selects: Callable[[VLM, ModelArguments, MoEArguments], Iterable[nn.Parameter]]


def _projector(vlm: VLM, args: ModelArguments, moe: MoEArguments) -> list[nn.Parameter]:
    chosen = list(vlm.parts["projector"].parameters())
    if vlm.section.use_im_start_end:  # the two new tokens mean nothing until their embeddings have learnt
        chosen += list(vlm.model.get_input_embeddings().parameters())
    return chosen


def _language_model_and_projector(vlm: VLM, args: ModelArguments, moe: MoEArguments) -> list[nn.Parameter]:
    with_projector = vlm.trains_projector and not args.freeze_mm_mlp_adapter
    if args.train_vision_projector is not None:
        with_projector = args.train_vision_projector
    chosen = vision_parameters(vlm, args, with_projector)
    if not args.freeze_backbone:
        chosen += [*vlm.parts["language_model"].parameters(), *vlm.parts["lm_head"].parameters()]
    return chosen


def vision_parameters(vlm: VLM, args: ModelArguments, with_projector: bool) -> list[nn.Parameter]:
    """What trains in full on the way from pixels to embeddings: the projector, and the encoder if a flag says so."""
    parts = vlm.parts
    chosen = list(parts["projector"].parameters()) if with_projector else []
    return chosen + (list(parts["vision_tower"].parameters()) if args.train_vision_encoder else [])


def _experts_and_routers(vlm: VLM, args: ModelArguments, moe: MoEArguments) -> list[nn.Parameter]:
    if moe.train_modules is None:
        return list(expert_parameters(vlm.model)) + beside_experts(vlm, args, moe)
    return _named_modules(vlm, moe.train_modules, _routers(vlm)) + _vision_if_named(vlm, args)


def beside_experts(vlm: VLM, args: ModelArguments, moe: MoEArguments) -> list[nn.Parameter]:
    """What trains in stage 3 beside the experts: routers, and of the vision parts those that flags ask for by name."""
    return _routers(vlm) + _vision_if_named(vlm, args)


def _routers(vlm: VLM) -> list[nn.Parameter]:
    spec = vlm.spec
    return [] if spec is None or spec.freeze_router else list(router_parameters(vlm.model))


def _vision_if_named(vlm: VLM, args: ModelArguments) -> list[nn.Parameter]:
    return vision_parameters(vlm, args, with_projector=bool(args.train_vision_projector))


def _named_modules(vlm: VLM, names: list[str], routers: list[nn.Parameter]) -> list[nn.Parameter]:
    """Parameters of the decoder's modules whose dotted name ends in one of `names` ('wg': the routers).

    Whole name components are compared, so 'fc1' never selects 'fc10'. The reference names dense MLPs
    'mlp.fc1'; inside an expert the same layer is found under the part after 'mlp.'.
    """
    decoder = vlm.parts["language_model"]
    chosen: list[nn.Parameter] = []
    unmatched = []
    for name in names:
        if name == "wg":
            chosen += routers
            continue
        endings = {name, name.removeprefix("mlp.")}
        found = [
            module for path, module in decoder.named_modules() if any(f".{path}".endswith(f".{end}") for end in endings)
        ]
        if not found:
            unmatched.append(name)
        chosen += [parameter for module in found for parameter in module.parameters()]
    if unmatched:
        known = sorted(
            {path.rsplit(".", 1)[-1] for path, child in decoder.named_modules() if not list(child.children())}
        )
        raise UserError(f"--train_modules {' '.join(unmatched)}: no such module. Leaf modules here: {', '.join(known)}")
    return chosen


PRETRAIN = Stage("pretrain", _projector)
FINETUNE = Stage("finetune", _language_model_and_projector)
MOE = Stage("moe", _experts_and_routers)


def stage_of(model: ModelArguments, moe: MoEArguments) -> Stage:
    """The stage that the flags ask for."""
    if model.tune_mm_mlp_adapter:
        return PRETRAIN
    return MOE if moe.moe_enable else FINETUNE


def freeze_all_but(model: nn.Module, trainable: Iterable[nn.Parameter]) -> None:
    """Sets `requires_grad` on exactly the given parameters. Raises UserError when that leaves none."""
    chosen = {id(parameter) for parameter in trainable}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("Nothing would train: the flags freeze every part of the model.")


def parameter_table(vlm: VLM) -> dict[str, dict[str, int]]:
    """Part of the model -> its number of trainable and frozen parameters, each parameter counted once.

    Rows: vision_tower, projector, language_model (what is left of it), experts, routers, lm_head.
    """
    groups: dict[str, Iterable[nn.Parameter]] = {}
    if moe_layers(vlm.model):
        groups["routers"] = router_parameters(vlm.model)
        groups["experts"] = expert_parameters(vlm.model)
    groups |= {name: module.parameters() for name, module in vlm.parts.items()}
    seen: set[int] = set()
    table = {}
    for name, parameters in groups.items():
        row = {"trainable": 0, "frozen": 0}
        for parameter in parameters:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                row["trainable" if parameter.requires_grad else "frozen"] += full_count(parameter)
        if sum(row.values()):
            table[name] = row
    return table


def full_count(parameter: nn.Parameter) -> int:
    """Numbers in a parameter, whole and unpacked."""
    packed = getattr(parameter, "quant_state", None)
    if packed is not None:  # in 4 bits two numbers share a byte
        return math.prod(packed.shape)
    # Under ZeRO-3 the local shard is empty, and DeepSpeed keeps the full count beside it.
    return getattr(parameter, "ds_numel", parameter.numel())


def render_table(table: dict[str, dict[str, int]]) -> str:
    """The table as aligned text, with a last line that sums it up."""
    total = {key: sum(row[key] for row in table.values()) for key in ("trainable", "frozen")}
    lines = [f"{'part':16} {'trainable':>16} {'frozen':>16}"]
    lines += [
        f"{name:16} {row['trainable']:16,} {row['frozen']:16,}" for name, row in (table | {"total": total}).items()
    ]
    return "\n".join(lines)


def save_table(table: dict[str, dict[str, int]], path: Path) -> None:
    """Writes the table as JSON beside the model."""
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
