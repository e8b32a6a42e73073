# SPDX-License-Identifier: Apache-2.0
"""A new folder's tensors as data: what each is made of. Nothing is read until it is written.

Legend: D hidden, E experts, I intermediate units of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moellava.convert.export.source import Source
from moellava.convert.tensor_files import TensorFiles


def same(tensor: Tensor) -> Tensor:
    """The tensor as it is."""
    return tensor


@dataclass(frozen=True)
class Piece:
    """A tensor of the new folder.

    Args:
        sources: names of the tensors that it is made of.
        make: makes it; of empty tensors an empty one.
    """

    sources: tuple[str, ...] = ()
    make: Callable[..., Tensor] = same


Pieces = dict[str, Piece]
"""Name in the new folder -> what it is made of, in the order of the files."""


def zeros(shape: tuple[int, ...], dtype: torch.dtype, value: float = 0.0) -> Piece:
    """A tensor that the source does not have."""
    return Piece((), lambda: torch.full(shape, value, dtype=dtype))


def write_pieces(pieces: Mapping[str, Piece], source: Source, folder: Path, shard_bytes: int) -> dict[str, str]:
    """Writes the safetensors of a new folder, a tensor at a time; returns their digests.

    Args:
        pieces: its tensors.
        source: what they are made of.
        folder: an existing folder.
        shard_bytes: largest file.
    """
    with torch.device("meta"):
        empty = {name: piece.make(*map(source.tensors.__getitem__, piece.sources)) for name, piece in pieces.items()}
    files = TensorFiles(folder, empty, shard_bytes, digested=True)
    for name, piece in pieces.items():
        files.write(name, piece.make(*map(source.read, piece.sources)))
    return files.digests
