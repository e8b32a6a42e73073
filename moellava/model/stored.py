# SPDX-License-Identifier: Apache-2.0
"""Weights that stay as they are stored until whoever opened the folder casts them.

Hugging Face casts while it loads, which takes the memory of a whole model in every process where a folder is in another
dtype than the run; a process that trains a share of each tensor needs no more than that share. And what trains in fp32
begins with every bit of the folder, not with what 16 bits leave of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import build_glob_alternation

from moellava.model.weights import has_weights, read_tensors

_KEPT = ContextVar("whether weights stay as they are stored", default=False)

MEANT = "meant_dtype"
"""Attribute of a parameter that is yet to be cast."""


@contextmanager
def as_stored(applies: bool = True) -> Iterator[None]:
    """Inside, models are opened with each weight in the dtype of its file, mapped where it was mapped; `meant` says
    what it was asked for. Nothing may be computed with them until they are cast."""
    token = _KEPT.set(applies)
    try:
        yield
    finally:
        _KEPT.reset(token)


def meant(parameter: torch.Tensor) -> torch.dtype:
    """The dtype that a parameter was asked for; its own, unless it was opened `as_stored`."""
    return getattr(parameter, MEANT, parameter.dtype)


class Stored(torch.Tensor):
    """A tensor that Hugging Face's loading takes as it is: moving and casting it give the tensor itself."""

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The plain tensor."""
        return self.as_subclass(torch.Tensor)


def to_load(
    folder: Path | None, config: Any, state: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor] | None:
    """The state dict that a model is opened with; None: as its folder says. Inside `as_stored`, of tensors that stay.

    Args:
        folder: where the weights lie; None: in `state`.
        config: of the model; quantised weights are unpacked by Hugging Face alone.
        state: its tensors, or None.
    """
    keeps = _KEPT.get() and getattr(config, "quantization_config", None) is None
    if keeps and state is None and folder is not None and has_weights(folder):
        state = read_tensors(folder)
    if state is None:
        return None
    return {name: value.as_subclass(Stored) if keeps else value for name, value in state.items()}


def note_meant(model: Any, structure: Any, dtype: torch.dtype) -> None:
    """Marks what is yet to be cast of a model that was opened `as_stored`. Buffers are small, and cast at once.

    Args:
        structure: the same model without memory, made in `dtype`: a module may want another one for itself.
        dtype: that the model was asked for; of what its class keeps in fp32 whatever is asked, fp32 is meant.
    """
    asked: dict[str, torch.dtype] = {name: value.dtype for name, value in structure.state_dict().items()}
    if plan := structure._get_dtype_plan(dtype):
        pattern, by_group, _ = build_glob_alternation(list(plan))
        for name in asked:
            if (found := pattern.search(name)) is not None:
                asked[name] = plan[by_group[found.lastgroup]]
    for name, parameter in model.named_parameters():
        _note(parameter, asked.get(name, parameter.dtype))
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(asked.get(name, buffer.dtype))


@contextmanager
def resized(model: Any) -> Iterator[None]:
    """Inside, the tables of a model's words may be exchanged for longer ones. They are cast first, as far as it loses
    nothing, since the new rows are computed from the old; what is yet to be cast of the old ones is of the new."""

    def tables() -> dict[str, nn.Parameter]:
        both = {"words": model.get_input_embeddings(), "head": model.get_output_embeddings()}
        named = ((f"{part}.{name}", p) for part, table in both.items() for name, p in table.named_parameters())
        return dict(named)

    asked = {name: meant(parameter) for name, parameter in tables().items()}
    for name, parameter in tables().items():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, asked[name]))
    yield
    for name, parameter in tables().items():
        _note(parameter, asked[name])


def _note(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    if parameter.is_floating_point() and parameter.dtype != dtype:
        setattr(parameter, MEANT, dtype)


def dtype_of_part(folder: Path, dtype: torch.dtype) -> torch.dtype:
    """What a part of a composed model is opened in, which is computed with before it is put together.

    Inside `as_stored` the wider one of `dtype` and of its file's, where that has one: nothing is lost, and what is
    found out (the factor of a head, say) is as exact as without.
    """
    if not _KEPT.get() or not has_weights(folder):
        return dtype
    stored = {tensor.dtype for tensor in read_tensors(folder).values() if tensor.is_floating_point()}
    return torch.promote_types(stored.pop(), dtype) if len(stored) == 1 else dtype
