# SPDX-License-Identifier: Apache-2.0
"""`--cache_pixels DIR`: each picture is decoded and brought to the tower's shape once, before step 0 of the first run
that shows it, whatever trains.

Later epochs, runs and stages read the pixels that the image processor made, to the bit: as 8-bit tones where these say
all of them, which are a quarter of the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from torch import Tensor

from moellava.data.dataset import SupervisedDataset
from moellava.data.feature_store import FeatureStore
from moellava.data.known import Known, KnownReader, KnownVideo, alike, beside_pixels, in_planes, pixels_in
from moellava.data.media_reader import BLANK, WIDE, Media, Shown
from moellava.data.plain_pixels import noise
from moellava.data.tones import tones_of
from moellava.data.video import Clip, Video
from moellava.errors import BadFileError, UserError
from moellava.train.known_pictures import know, pixels_of, require_folder
from moellava.vlm import VLM

FLAG = "--cache_pixels"

LARGE = (2048, 1024)
"""Width and height in pixels that processors bring down."""


def refuse_pixels(vlm: VLM, folder: str, args: Any) -> None:
    """Raises UserError where the model's pictures cannot be kept each by itself."""
    if not shows_the_same(vlm.encoder.reader):
        raise UserError(
            f"{FLAG} {folder}: what {type(vlm.encoder.reader.processor).__name__} makes of a picture depends on those "
            "beside it, so that it cannot be kept by itself. Leave the flag out."
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
        tried = [pixels_of(reader, [picture], True) for picture in (*noise(), *videos_to_try(reader))]
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
        return self.tones.patches(planes.numpy()) if self.tones else planes


def shows_the_same(reader: Any) -> bool:
    """Whether a batch of pictures that are known, each by itself, is the batch that the processor makes of them."""
    try:
        if not is_told_by_size(reader):
            return False
        batches = tried(reader, batches_to_try(reader))
    except (BadFileError, KeyError, RuntimeError, ValueError):  # no pixels by that name, or what cannot be put together
        return False
    return all(alike(found, wanted) for found, wanted in batches)


def is_told_by_size(reader: Any) -> bool:
    """Whether the size of a picture tells all that the processor gives of it but pixels, and a row of these is of one
    shape [3, H, W], however large the picture is. A large one may have further inputs, of its tiles."""
    shape = pixels_of(reader, [Image.new("RGB", BLANK)], True).shape[1:]
    for size in (LARGE, LARGE[::-1]):
        media = [reader.read([[one]]) for one in (noise()[0].resize(size), Image.new("RGB", size))]
        found, wanted = (Media(one.runs, beside_pixels(one)) for one in media)
        rows = in_planes(pixels_in(reader, media[0], "image"))
        if not alike(found, wanted) or rows.shape[-3:] != shape:
            return False
    return True


def batches_to_try(reader: Any) -> list[list[list[Shown]]]:
    """Batches of samples: an image, two, and where the model reads videos a video and both."""
    first, *others = noise()
    batches: list[list[list[Shown]]] = [[[first], [*others]]]
    for video in videos_to_try(reader):
        batches += [[[video]], [[first], [others[0], video]]]
    return batches


def videos_to_try(reader: Any) -> list[Video]:
    """One of noise, where the model reads videos."""
    first, second, _ = (picture.resize(WIDE) for picture in noise())
    return [Video(Clip(WIDE, 9, 1.0, (0, 3, 8)), (first, second, first))] if reader.reads_videos else []


def tried(reader: Any, batches: list[list[list[Shown]]]) -> list[tuple[Media, Media]]:
    """Of each batch of samples: what is read of pictures that are known, and what the processor makes of them."""
    samples = list(chain.from_iterable(batches))
    kept, every = KeptPixels(reader), [(one, images_of(sample)) for sample in samples for one in sample]
    with TemporaryDirectory() as folder:
        store = FeatureStore(Path(folder))
        for number, (one, images) in enumerate(every):
            alone = isinstance(one, Video) or images == 1
            store.add(number, BLANK, kept.of(pixels_of(reader, [one], alone)))
        store.flush()
        store.reopen()
        numbers, known = iter(range(len(every))), KnownReader(reader, store, kept.shown)
        by_number = [[[as_known(one, next(numbers)) for one in sample] for sample in batch] for batch in batches]
        return [(known.read(found), reader.read(batch)) for found, batch in zip(by_number, batches, strict=True)]


def images_of(sample: list[Shown]) -> int:
    """How many of a sample's pictures are images."""
    return sum(not isinstance(one, Video) for one in sample)


def as_known(shown: Shown, place: int) -> Known | KnownVideo:
    """A picture that stands in a store."""
    return KnownVideo(shown.clip, (), place) if isinstance(shown, Video) else Known(shown.size, place)
