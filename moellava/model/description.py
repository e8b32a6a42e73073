# SPDX-License-Identifier: Apache-2.0
"""A model folder as data: what is built from it, and what makes the model's inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moellava.model.integrity import opening
from moellava.model.parts import Keywords


@dataclass(frozen=True)
class Description:
    """What a folder describes, before its weights are read.

    Args:
        folder: where it lies.
        config: of the model class that is built, with its `moellava` and `moe` sections.
        whereabouts: where the model's parts are, or what finds them out.
        inputs: makes tokenizer and processor; both are None where a published folder has no tokenizer.
        load: makes the model, on the CPU and in evaluation mode, in a dtype.
        architecture: of a released model, its entry; None for what is composed here.
        streams: whether its safetensors hold the tensors of its model class, so that they can be converted one by one.
    """

    folder: Path
    config: Any
    whereabouts: Keywords | Callable[[], Keywords]
    inputs: Callable[[], tuple[Any, Any]]
    load: Callable[[torch.dtype], Any]
    architecture: Any = None
    streams: bool = True

    def __post_init__(self) -> None:
        for name in ("inputs", "load"):
            object.__setattr__(self, name, _guarded(getattr(self, name), str(self.folder)))

    @functools.cached_property
    def keywords(self) -> Keywords:
        """Where the model's parts are. Raises UserError where they have to be found out and cannot be told apart."""
        found = self.whereabouts
        return found if isinstance(found, Keywords) else _guarded(found, str(self.folder))()


def _guarded(make: Callable[..., Any], called: str) -> Callable[..., Any]:
    """The same function, whose errors are those of the folder. See `opening`."""

    @functools.wraps(make)
    def guarded(*args: Any) -> Any:
        with opening(called):
            return make(*args)

    return guarded
