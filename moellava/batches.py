# SPDX-License-Identifier: Apache-2.0
"""Records as inputs of a model, for those who watch it rather than train it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from moellava.data.dataset import opened, sample_of
from moellava.data.media import MediaFiles
from moellava.data.records import Records
from moellava.vlm import VLM

AT_ONCE = 8
"""Records of a batch: what is watched is summed up, so that it says nothing of them."""


def batches_of(
    vlm: VLM, records: Records, files: MediaFiles, count: int | None = None, size: int = AT_ONCE
) -> Iterator[dict[str, Tensor]]:
    """Batches of the model's collator, with labels, on its device.

    Args:
        vlm: the model.
        records: of `load_records`.
        files: where images and videos lie.
        count: records, spread evenly over the data; None: all.
        size: records of a batch.

    Raises:
        BadFileError: an image or a video cannot be read.
    """
    collator, chosen = vlm.collator(), spread(len(records), count)
    for start in range(0, len(chosen), size):
        batch = collator([_sample(vlm, records, number, files) for number in chosen[start : start + size]])
        yield {name: value.to(vlm.model.device) for name, value in batch.items() if isinstance(value, Tensor)}


def spread(total: int, count: int | None) -> list[int]:
    """So many of `total` numbers, evenly spread; all of them for None."""
    wanted = total if count is None else min(count, total)
    return [place * total // wanted for place in range(wanted)]


def _sample(vlm: VLM, records: Records, number: int, files: MediaFiles) -> dict[str, Any]:
    name = records.name(number)
    example = vlm.encoder.encode(records[number], name, files)
    return sample_of(example, opened(example.media, vlm.encoder, files), name)
