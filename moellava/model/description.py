"""A model folder as data: what is built from it, and what makes the model's inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moellava.model.parts import Keywords


@dataclass(frozen=True)
class Description:
    """What a folder describes, before its weights are read.

    Args:
        folder: where it lies.
        config: of the model class that is built, with its `moellava` and `moe` sections.
        keywords: where the model's parts are.
        inputs: makes tokenizer and processor; both are None where a published folder has no tokenizer.
        load: makes the model, on the CPU and in evaluation mode, in a dtype.
        architecture: of a released model, its entry; None for what is composed here.
        streams: whether its safetensors hold the tensors of its model class, so that they can be converted one by one.
    """

    folder: Path
    config: Any
    keywords: Keywords
    inputs: Callable[[], tuple[Any, Any]]
    load: Callable[[torch.dtype], Any]
    architecture: Any = None
    streams: bool = True
