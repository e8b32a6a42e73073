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
from moellava.model.builder import parts_of
from moellava.moe import expert_parameters, moe_layers, router_parameters
from moellava.train.arguments import ModelArguments, MoEArguments


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Args:
        name: what stands in logs and in the saved config.
        selects: (model, model arguments, MoE arguments) -> the parameters that train.
    """

    name: str
    selects: Callable[[nn.Module, ModelArguments, MoEArguments], Iterable[nn.Parameter]]


def _projector(model: nn.Module, args: ModelArguments, moe: MoEArguments) -> list[nn.Parameter]:
    parts = parts_of(model)
    chosen = list(parts["projector"].parameters())
    if model.config.moellava["use_im_start_end"]:  # the two new tokens mean nothing until their embeddings have learnt
        chosen += list(model.get_input_embeddings().parameters())
    return chosen


def _language_model_and_projector(model: nn.Module, args: ModelArguments, moe: MoEArguments) -> list[nn.Parameter]:
    parts = parts_of(model)
    chosen = vision_parameters(model, args, with_projector=not args.freeze_mm_mlp_adapter)
    if not args.freeze_backbone:
        chosen += list(parts["language_model"].parameters()) + list(parts["lm_head"].parameters())
    return chosen


def vision_parameters(model: nn.Module, args: ModelArguments, with_projector: bool) -> list[nn.Parameter]:
    """What trains in full on the way from pixels to embeddings: the projector, and the encoder if a flag says so."""
    parts = parts_of(model)
    chosen = list(parts["projector"].parameters()) + loose_parameters(model) if with_projector else []
    return chosen + (list(parts["vision_tower"].parameters()) if args.train_vision_encoder else [])


def loose_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of no part, such as the line break between rows of patches; they belong with the projector."""
    placed = {id(parameter) for part in parts_of(model).values() for parameter in part.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in placed]


def _experts_and_routers(model: nn.Module, args: ModelArguments, moe: MoEArguments) -> list[nn.Parameter]:
    if moe.train_modules is None:
        return list(expert_parameters(model)) + beside_experts(model, args, moe)
    return _named_modules(model, moe.train_modules, _routers(model, moe)) + _vision_if_named(model, args)


def beside_experts(model: nn.Module, args: ModelArguments, moe: MoEArguments) -> list[nn.Parameter]:
    """What trains in stage 3 beside the experts: routers, and of the vision parts those that flags ask for by name."""
    return _routers(model, moe) + _vision_if_named(model, args)


def _routers(model: nn.Module, moe: MoEArguments) -> list[nn.Parameter]:
    return [] if moe.spec().freeze_router else list(router_parameters(model))


def _vision_if_named(model: nn.Module, args: ModelArguments) -> list[nn.Parameter]:
    return vision_parameters(model, args, with_projector=bool(args.train_vision_projector))


def _named_modules(model: nn.Module, names: list[str], routers: list[nn.Parameter]) -> list[nn.Parameter]:
    """Parameters of the decoder's modules whose dotted name ends in one of `names` ('wg': the routers).

    Whole name components are compared, so 'fc1' never selects 'fc10'. The reference names dense MLPs
    'mlp.fc1'; inside an expert the same layer is found under the part after 'mlp.'.
    """
    decoder = parts_of(model)["language_model"]
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


def parameter_table(model: nn.Module) -> dict[str, dict[str, int]]:
    """Part of the model -> its number of trainable and frozen parameters, each parameter counted once.

    Rows: vision_tower, projector, language_model (what is left of it), experts, routers, lm_head.
    """
    groups: dict[str, Iterable[nn.Parameter]] = {}
    if moe_layers(model):
        groups["routers"] = router_parameters(model)
        groups["experts"] = expert_parameters(model)
    groups |= {name: module.parameters() for name, module in parts_of(model).items()}
    groups["other"] = model.parameters()
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
