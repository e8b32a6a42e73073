# SPDX-License-Identifier: Apache-2.0
"""Where in an Arrow file the values of its columns of bytes lie: in its map they are as in the file, unless their batch
is packed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from moellava.data.parquet_pages import Key, key_of
from moellava.data.shard_places import Place


def places_in_map(batch: Any, memory: range, file: str) -> dict[Key, Place]:
    """The places of a batch's values of bytes, by the keys of their contents.

    Args:
        batch: of `pyarrow`.
        memory: addresses of the file's map.
        file: its name in a folder; '' where it lies in none.
    """
    values = (value for column in batch.columns for value in _values(column))
    return {
        key_of(content): Place(address - memory.start, len(content), file)
        for address, content in values
        if address in memory
    }


def _values(array: Any) -> Iterator[tuple[int, bytes]]:
    """The addresses and contents of an array's values of bytes, in lists and structures too."""
    from pyarrow import types

    type_ = array.type
    if not len(array):
        return
    if types.is_struct(type_):
        for number in range(type_.num_fields):
            yield from _values(array.field(number))
    elif types.is_list(type_) or types.is_large_list(type_):
        first, end = array.offsets[0].as_py(), array.offsets[-1].as_py()
        yield from _values(array.values.slice(first, end - first))
    elif types.is_binary(type_) or types.is_large_binary(type_):
        _, borders, data = array.buffers()
        width = np.dtype(np.int32 if types.is_binary(type_) else np.int64)
        ends = np.frombuffer(borders, width)[array.offset : array.offset + len(array) + 1].tolist()
        for begin, end in zip(ends, ends[1:], strict=False):
            if end > begin:
                yield data.address + begin, data.slice(begin, end - begin).to_pybytes()
