# SPDX-License-Identifier: Apache-2.0
"""Named parameter groups: projector or rest, with or without weight decay, experts apart.

DeepSpeed refuses an optimizer whose experts are not in groups of their own ('None of the param groups are marked as
MoE'), and the optimizer that its JSON file describes would put all parameters into one group. So the groups are made
here, for every engine.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moellava.train.fsdp import mesh_of


def parameter_groups(
    model: nn.Module,
    projector: nn.Module,
    *,
    weight_decay: float,
    learning_rate: float,
    projector_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters, each with a name. Biases and norms (1-D tensors) do not decay.

    Args:
        model: the model.
        projector: its projector.
        weight_decay: AdamW's decoupled decay (Loshchilov and Hutter 2019, arXiv:1711.05101).
        learning_rate: of everything but the projector.
        projector_lr: of the projector; None: `learning_rate`.
    """
    in_projector = {id(parameter) for parameter in projector.parameters()}
    groups: dict[str, dict[str, Any]] = {}
    meshes: dict[Any, str] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        part = "projector" if id(parameter) in in_projector and projector_lr is not None else "model"
        decays = parameter.ndim > 1 and weight_decay > 0
        mesh = mesh_of(parameter)
        meshes.setdefault(mesh, "" if not meshes else f"_{len(meshes)}")  # one step's kernel spans no two of them
        name = f"{part}_{'decay' if decays else 'no_decay'}{meshes[mesh]}"
        group = groups.setdefault(
            name,
            {
                "name": name,
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                "lr": projector_lr if part == "projector" else learning_rate,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def missing_from(optimizer_groups: list[dict[str, Any]], model: nn.Module) -> list[str]:
    """Names of trainable parameters that no optimizer group holds: a run that would leave them as they are."""
    held = {id(parameter) for group in optimizer_groups for parameter in group["params"]}
    return [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in held
    ]
