# SPDX-License-Identifier: Apache-2.0
"""safetensors files of known names, shapes and places, that are filled in any order: nothing is held until the end.

Where it is asked for, what is written in the order of the files is digested on the way, so that nobody has to read it
again; by a thread beside the writing one, since both take about as long.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moellava.errors import UserError
from moellava.model.saving import INDEX
from moellava.model.weights import DTYPES


@dataclass(frozen=True)
class Slot:
    """Where a tensor of the new folder lies.

    Args:
        dtype, shape: as the tensor must be.
        file: name of the safetensors file.
        start: first byte, counted from the file's beginning.
    """

    dtype: torch.dtype
    shape: torch.Size
    file: str
    start: int


class TensorFiles:
    """safetensors files that are filled in any order.

    Args:
        folder: an existing folder.
        tensors: name -> empty (meta) tensor, in the order of the files.
        shard_bytes: largest file; 0: there is one.
        stem: how the files' names begin.
        digested: `digests` are wanted.
    """

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, Tensor],
        shard_bytes: int = 0,
        stem: str = "model",
        digested: bool = False,
    ):
        self.folder = folder
        self.slots: dict[str, Slot] = {}
        self._digested: dict[str, tuple[Any, int]] = {}  # file -> the digest of its first bytes, and how many they are
        self._sizes: dict[str, int] = {}
        self._beside = ThreadPoolExecutor(1) if digested else None
        self.missing = set(tensors)
        shards = _cut(tensors, shard_bytes) if shard_bytes else [tensors]
        for number, shard in enumerate(shards, start=1):
            many = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
            name = f"{stem}{many}.safetensors"
            self._lay_out(name, shard)
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors.values())
            places = {tensor: slot.file for tensor, slot in sorted(self.slots.items())}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _lay_out(self, file: str, tensors: dict[str, Tensor]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, tensor in tensors.items():
            offsets = [position, position + tensor.nbytes]
            header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
            position = offsets[1]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        begin = len(head)
        self._sizes[file] = begin + position
        for name, tensor in tensors.items():
            self.slots[name] = Slot(tensor.dtype, tensor.shape, file, begin + header[name]["data_offsets"][0])
        with open(self.folder / file, "wb") as handle:
            handle.write(head)
            handle.truncate(begin + position)
        self._digested[file] = (hashlib.sha256(head), begin)

    @property
    def digests(self) -> dict[str, str]:
        """File -> SHA-256 of what has been written, where that was `digested`, and in the order of its tensors."""
        found = self._digested.items()
        return {file: digest.hexdigest() for file, (digest, end) in found if end == self._sizes[file]}

    def write(self, name: str, tensor: Tensor) -> None:
        """Puts a tensor in its place. Raises UserError if the new folder has no such place."""
        slot = self.slots.get(name)
        if slot is None or slot.shape != tensor.shape:
            wanted = "no such tensor" if slot is None else f"{list(slot.shape)}"
            raise UserError(f"{name} is {list(tensor.shape)} in the weights, but its config.json says {wanted}.")
        numbers = tensor.detach().to(slot.dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
        digested = None if self._beside is None else self._beside.submit(self._digest, slot, memoryview(numbers))
        with open(self.folder / slot.file, "r+b", buffering=0) as handle:
            handle.seek(slot.start)
            handle.write(memoryview(numbers))
        if digested is not None:
            digested.result()
        self.missing.discard(name)

    def _digest(self, slot: Slot, numbers: memoryview) -> None:
        """Takes what is written into a slot into its file's digest, if it is what comes next there."""
        digest, end = self._digested[slot.file]
        if end == slot.start:
            digest.update(numbers)
            self._digested[slot.file] = (digest, end + len(numbers))


def _cut(tensors: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Groups of tensors of at most `limit` bytes each, in order."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards
