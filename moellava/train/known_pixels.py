# SPDX-License-Identifier: Apache-2.0
"""`--cache_pixels DIR`: each picture is decoded and brought to the tower's shape once, before step 0 of the first run
that shows it, whatever trains.

Later epochs, runs and stages read the pixels that the image processor made, to the bit: as 8-bit tones where these say
all of them, which are a quarter of the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from moellava.data.dataset import SupervisedDataset
from moellava.data.feature_store import FeatureStore
from moellava.data.known import PIXELS, Known, KnownReader
from moellava.data.media_reader import blank
from moellava.data.plain_pixels import noise
from moellava.data.tones import tones_of
from moellava.errors import BadFileError, UserError
from moellava.train.known_pictures import know, pixels_of, require_folder
from moellava.vlm import VLM

FLAG = "--cache_pixels"


def refuse_pixels(vlm: VLM, folder: str, args: Any) -> None:
    """Raises UserError where the model's pictures are not of one shape each, so that each could be kept by itself."""
    if not shows_the_same(vlm.encoder.reader):
        raise UserError(
            f"{FLAG} {folder}: {type(vlm.encoder.reader.processor).__name__} makes pictures of many shapes, which are "
            "not kept. Leave the flag out."
        )
    require_folder(FLAG, folder)


def know_pixels(trainer: Any, folder: Path, datasets: Sequence[SupervisedDataset]) -> None:
    """Has a trainer's data sets and collator use pixels of `folder`; those that are not there are made. Raises
    UserError and BadFileError: see `know`."""
    know(trainer, folder, datasets, KeptPixels(trainer.vlm.encoder.reader))


class KeptPixels:
    """Pixels, as tones where these say all of them. See `Kept`.

    Args:
        reader: of the model's processor.
    """

    flag, called = FLAG, "Pixels"

    def __init__(self, reader: Any):
        tones = tones_of(reader.processor.image_processor)
        tried = [pixels_of(reader, [picture], True) for picture in noise()]
        self.tones = tones if tones and all(tones.of(pixels) is not None for pixels in tried) else None
        self.settings = {"kept": "tones" if self.tones else "pixels"}

    def require_repeatable(self, pixels: Tensor) -> None:
        """They are: nothing is drawn."""

    def of(self, pixels: Tensor) -> Tensor:
        """[N, 3 × H, W] of pixels [N, 3, H, W]. Raises UserError where tones do not say all of them."""
        kept = self.tones.of(pixels) if self.tones else pixels
        if kept is None:
            raise UserError(f"{FLAG}: the image processor gives pixels that are no tones. Leave the flag out.")
        return kept.flatten(1, 2)

    def shown(self, kept: Tensor) -> Tensor:
        """Pixels [N, 3, H, W]."""
        planes = kept.unflatten(1, (3, -1))
        return self.tones.pixels(planes.numpy()) if self.tones else planes


def shows_the_same(reader: Any) -> bool:
    """Whether a batch of pictures that are known, each by itself, is the batch that the processor makes of them."""
    pixels = reader.read([[blank("image")]]).tensors.get(PIXELS["image"])
    if reader.is_one_input or pixels is None or pixels.ndim not in (4, 5):
        return False
    tried = noise()
    samples = [tried[:1], tried[1:]]
    try:
        wanted, kept = reader.read(samples), KeptPixels(reader)
        with TemporaryDirectory() as folder:
            store = FeatureStore(Path(folder))
            for number, picture in enumerate(tried):
                store.add(number, picture.size, kept.of(pixels_of(reader, [picture], number == 0)))
            store.flush()
            store.reopen()
            known = [Known(picture.size, number) for number, picture in enumerate(tried)]
            found = KnownReader(reader, store, kept.shown).read([known[:1], known[1:]])
    except (BadFileError, RuntimeError):  # pictures of several shapes cannot be put together
        return False
    return found.runs == wanted.runs and same(found.tensors, wanted.tensors)


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Whether two batches have the same inputs, to the bit."""
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
