# SPDX-License-Identifier: Apache-2.0
"""What is exported: a model's structure, and its tensors one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from moellava.convert.streaming import streamed
from moellava.errors import UserError
from moellava.model.description import Description
from moellava.model.extended import Extension, extension_of
from moellava.model.saving import without_ties
from moellava.model.weights import Place, file_dtypes, locate, require_sizes, shapes_in, weight_files
from moellava.moe import MoESpec, moe_layers
from moellava.moe.decoder import decoder_layers, mlp_names
from moellava.moe.layer import RoutedMLP
from moellava.moe.mlp import layout_of


@dataclass(frozen=True)
class Layer:
    """A decoder layer.

    Args:
        index: from 0.
        prefix: how its tensors begin, with a trailing dot.
        mlp: its MLP's attribute.
        names: its tensors, without the prefix.
        n_experts: E of a sparse one; 0 of a dense one.
    """

    index: int
    prefix: str
    mlp: str
    names: tuple[str, ...]
    n_experts: int


@dataclass(frozen=True)
class Source:
    """A model that is exported.

    Args:
        called: how messages name it.
        config: of its class, extended or not, with its sections.
        model: its structure, without memory.
        tensors: name in its class -> empty tensor, with the dtype that it is stored in; a tied head is left out.
        read: name -> the tensor itself.
        description: what it was opened by.
    """

    called: str
    config: Any
    model: nn.Module
    tensors: Mapping[str, Tensor]
    read: Callable[[str], Tensor]
    description: Description

    @property
    def spec(self) -> MoESpec | None:
        """Options of a sparse model; None for a dense one."""
        return self.extension.moe

    @cached_property
    def extension(self) -> Extension:
        """What its config asks for beyond Hugging Face's class."""
        return extension_of(self.config)

    @property
    def text(self) -> Any:
        """The language model's config."""
        return self.config.get_text_config()

    @cached_property
    def sparse(self) -> list[tuple[int, RoutedMLP]]:
        """Its MoE layers by the index of their decoder layer, without memory."""
        return moe_layers(self.model)

    @cached_property
    def layers(self) -> list[Layer]:
        """Its decoder layers, in order. Raises UserError where it is sparse and they cannot be told."""
        counts = {index: module.n_experts for index, module in self.sparse}
        names = {id(module): name for name, module in self.model.named_modules()}
        layers = decoder_layers(self.model)
        mlps = mlp_names(self.model, range(len(layers)))
        prefixes = [f"{names[id(layer)]}." for layer in layers]
        held: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
        for name in self.tensors:
            found = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
            if found is not None:
                held[found].append(name.removeprefix(found))
        return [
            Layer(index, prefix, mlps[index], tuple(held[prefix]), counts.get(index, 0))
            for index, prefix in enumerate(prefixes)
        ]

    @cached_property
    def expert(self) -> nn.Module:
        """The first expert of its first sparse layer, without memory."""
        return next(iter(self.sparse[0][1].local_experts().values()))

    @property
    def width(self) -> int:
        """Intermediate units of an expert."""
        return getattr(self.expert, layout_of(self.expert).output).in_features

    @property
    def linears(self) -> tuple[tuple[str, ...], str]:
        """What the linears of an expert are called: D -> I (or 2 I), and I -> D."""
        layout = layout_of(self.expert)
        return tuple(layout.inputs), layout.output

    @property
    def has_shared(self) -> bool:
        """Whether its sparse layers have an MLP that every token visits."""
        return any(module.shared is not None for _, module in self.sparse)


@contextmanager
def opened_source(description: Description, called: str) -> Iterator[Source]:
    """A folder as something that is exported: from its files one by one where it is laid out as its class is, else
    from memory.

    Raises:
        UserError: weights that are not the config's.
    """
    config = description.config
    require_sizes(config, shapes_in(description.folder), called)
    model = streamed(description)
    if model is not None:
        places = locate(weight_files(description.folder), model)
        yield Source(called, config, model, _stored(model, places), lambda name: places[name].read(), description)
        return
    loaded = description.load(config.dtype or torch.float32)
    state = without_ties(loaded, loaded.state_dict())
    empty = {name: tensor.to("meta") for name, tensor in state.items()}
    yield Source(called, loaded.config, loaded, empty, state.__getitem__, description)


def _stored(model: nn.Module, places: Mapping[str, Place]) -> dict[str, Tensor]:
    """The tensors of a folder, empty. Raises UserError where one of the model's is not there."""
    state, dtypes = model.state_dict(), file_dtypes(dict(places))
    missing = sorted(set(without_ties(model, state)) - set(places))
    if missing:
        raise UserError(f"The weights lack tensors of their config.json: {', '.join(missing[:5])} …")
    return {
        name: torch.empty(tensor.shape, dtype=dtypes[name], device="meta")
        for name, tensor in state.items()
        if name in places
    }
