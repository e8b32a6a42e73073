# SPDX-License-Identifier: Apache-2.0
"""What a run keeps of the pictures that it shows, each opened once, before step 0 of the first run that shows it.

Later epochs, runs and stages open no picture. What is kept lies in a folder of the flag's that is named by all that
decides over it. See `known_features.py` and `known_pixels.py` for what that is.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moellava.data.dataset import SupervisedDataset
from moellava.data.feature_store import FeatureStore
from moellava.data.fingerprint import processor_settings, versions
from moellava.data.known import (
    Contents,
    KnownMedia,
    KnownReader,
    in_planes,
    key_of_blank,
    keys_of,
    pixels_in,
    variant,
)
from moellava.data.media_reader import BLANK, blank, modality_of
from moellava.data.nested import tiles_shown
from moellava.data.records import MODALITIES, media_of
from moellava.data.scan import gathered, with_progress
from moellava.data.shown import Shown
from moellava.data.video import Video
from moellava.errors import BadFileError, UserError
from moellava.files import problem_of_writing, write_json
from moellava.log import get_logger
from moellava.processes import rank, world_size

logger = get_logger(__name__)


PACKAGES = ("transformers", "pillow", "av")
ROOMS = (
    "data/images.py",
    "data/video.py",
    "data/frame_processors.py",
    "data/plain_pixels.py",
    "data/tabled.py",
    "data/patched.py",
    "data/resized.py",
    "data/tones.py",
    "data/strips.py",
    "model/tower_images.py",
    "model/joined_towers.py",
)
"""What makes a tower's pixels of files."""

SETTINGS = "settings.json"
"""What decides over what is kept beside it, for people to read."""


class Kept(Protocol):
    """What is kept of a picture.

    Attributes:
        flag: asks for it, and names the folder.
        called: what it is, in the log.
        settings: what decides over it beside the image processor.
    """

    flag: str
    called: str
    settings: dict[str, Any]

    def require_repeatable(self, pixels: Tensor) -> None:
        """Raises UserError where something else would be kept of the same pixels [N, 3, H, W] another time."""

    def of(self, pixels: Tensor) -> Tensor:
        """What is kept [N, P, D] of pixels [N, 3, H, W]."""

    def shown(self, kept: Tensor) -> Tensor:
        """What the model is shown of it, [N, 1, P, D] or [N, 3, H, W]."""


def require_folder(flag: str, folder: str) -> None:
    """Raises UserError where nothing can be kept in a folder."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        problem = problem_of_writing(Path(folder))
    except OSError as error:
        problem = error.strerror
    if problem:
        raise UserError(f"{flag} {folder} cannot be written: {problem}")


def know(trainer: Any, folder: Path, datasets: Sequence[SupervisedDataset], kept: Kept) -> None:
    """Has a trainer's data sets and collator show what is kept in `folder`; what is not there is made.

    All processes come here together; each makes a share.

    Raises:
        UserError: it would be another each time, the disk is too small, or not the same for all processes.
        BadFileError: a file that cannot be decoded, unless bad files are skipped.
    """
    encoder = trainer.vlm.encoder
    maker = Maker(trainer, folder, kept)
    for dataset in datasets:
        contents = Contents(Shown(dataset.records), dataset.files)
        maker.make(pictures_of(dataset, contents), dataset)
        dataset.known = KnownMedia(maker.store, contents, encoder)
    trainer.data_collator.reader = KnownReader(encoder.reader, maker.store, kept.shown)
    logger.info("%s", maker)


@dataclass
class Pictures:
    """The distinct pictures of a data set.

    Attributes:
        keys: uint64 [N].
        records: the number of a record that shows each [N].
        places: which of that record's media it is [N].
        alone: whether it is read as an image that is alone in its record [N].
    """

    keys: np.ndarray
    records: np.ndarray
    places: np.ndarray
    alone: np.ndarray


def pictures_of(dataset: SupervisedDataset, contents: Contents) -> Pictures:
    """What the samples of a data set show."""
    shown, encoder, files = Shown(dataset.records), dataset.encoder, dataset.files
    is_video = shown.modality[shown.which] == MODALITIES.index("video")
    records = np.repeat(np.arange(len(shown.counts)), shown.counts)
    places = np.arange(len(records)) - np.repeat(np.cumsum(shown.counts) - shown.counts, shown.counts)
    images = np.where(is_video, files.num_frames if encoder.in_frames else 0, 1)
    alone = np.bincount(records, images, len(shown.counts))[records] == 1
    if not encoder.reader.needs_sizes:
        alone |= True
    elif not encoder.in_frames:
        alone |= is_video
    kept = np.isin(records, dataset.numbers)
    # Of a record that is cut, the first image may be the one that is left.
    first = np.flatnonzero(kept & ~alone & (places == 0) & np.isin(records, dataset.numbers[dataset.cut]))
    chosen = np.concatenate([np.flatnonzero(kept), first])
    alone = np.concatenate([alone[kept], np.ones(len(first), bool)])
    variants = variant(is_video[chosen], alone, files.num_frames)
    keys, which = np.unique(keys_of(contents.of_media[shown.which[chosen]], variants), return_index=True)
    return Pictures(keys, records[chosen][which], places[chosen][which], alone[which])


class Maker:
    """Makes what is kept of pictures that are not there.

    Args:
        trainer: of the run.
        folder: of the flag.
        kept: what that is.

    Attributes:
        store: where it lies.
        asked, made: pictures of the data, and those of them that were not there.
    """

    def __init__(self, trainer: Any, folder: Path, kept: Kept):
        self.trainer, self.kept = trainer, kept
        self.reader: Any = trainer.vlm.encoder.reader
        settings = kept.settings | {
            "processor": processor_settings(self.reader.processor)[1:],
            "versions": versions(PACKAGES, ROOMS),
        }
        text = json.dumps(settings, sort_keys=True, default=repr)
        self.store = FeatureStore(folder / hashlib.sha256(text.encode()).hexdigest()[:32])
        if rank() == 0:
            write_json(self.store.folder / SETTINGS, json.loads(text))
        self.asked = self.made = 0

    def __str__(self) -> str:
        return (
            f"{self.kept.called}: {self.asked} pictures, {self.asked - self.made} of them known before, {self.made} "
            f"computed; {self.store.folder} holds {len(self.store)} in {self.store.bytes / 1e6:,.1f} MB"
        )

    def _require_repeatable(self) -> None:
        shape = pixels_in(self.reader, self.reader.read([[blank("image")]]), "image").shape[-3:]
        self.kept.require_repeatable(torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))

    def make(self, pictures: Pictures, dataset: SupervisedDataset) -> None:
        """Makes what is missing; this process a share of it. Raises UserError and BadFileError: see `know`."""
        missing = np.flatnonzero(~np.isin(pictures.keys, self.store.keys))
        self.asked, self.made = self.asked + len(pictures.keys), self.made + len(missing)
        if len(missing):
            self._require_repeatable()
        self._make_blanks()
        unread = Unread(dataset, pictures, missing[rank() :: world_size()])
        size = self.trainer.args.per_device_train_batch_size
        loader = DataLoader(
            unread,
            batch_size=size,
            num_workers=self.trainer.args.dataloader_num_workers,
            collate_fn=list,
            generator=torch.Generator(),
        )
        failed: set[int] = set()
        for number, batch in enumerate(with_progress(loader, len(loader), f"{self.kept.called} of pictures")):
            readable = [one for one in batch if one.pixels is not None]
            failed |= {one.key for one in batch if one.pixels is None}
            kept = self._keep(readable)
            if number == 0 and readable:
                self._require_room(len(unread) * kept // len(readable))
        self._settle(pictures, set().union(*gathered(failed)))

    def _settle(self, pictures: Pictures, failed: set[int]) -> None:
        """Sees what all processes have written."""
        self.store.flush()
        self.trainer.accelerator.wait_for_everyone()
        self.store.reopen()
        lost = pictures.keys[~np.isin(pictures.keys, self.store.keys)]
        if not set(lost.tolist()) <= failed:
            raise UserError(
                f"{self.kept.flag} {self.store.folder.parent}: {len(lost)} pictures are not there that another process "
                "has written. The folder has to lie on a disk that all hosts share."
            )

    def _make_blanks(self) -> None:
        """Those of what stands in where a batch shows nothing."""
        blanks = [(key_of_blank(name), blank(name)) for name in self.reader.placeholders]
        missing = [(key, shown) for key, shown in blanks if rank() == 0 and self.store.place(key) is None]
        self._keep([Pixels(key, BLANK, pixels_of(self.reader, [shown], True)) for key, shown in missing])

    def _keep(self, some: Sequence[Pixels]) -> int:
        """Adds several pictures at a time; gives the bytes that they take."""
        if not some:
            return 0
        rows = [one.pixels for one in some]
        kept = self.kept.of(torch.cat(rows)).cpu()
        for one, own in zip(some, kept.split([len(row) for row in rows]), strict=True):
            self.store.add(one.key, one.size, own.contiguous())
        return kept.nbytes

    def _require_room(self, own: int) -> None:
        """Raises UserError where so many bytes of each process will not fit onto the disk."""
        needed, free = own * world_size(), shutil.disk_usage(self.store.folder).free
        if needed > free:
            raise UserError(
                f"{self.kept.flag} {self.store.folder.parent}: the {self.kept.called.lower()} take about "
                f"{needed / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB are free there."
            )


@dataclass
class Pixels:
    """A picture as the tower sees it.

    Attributes:
        key: of the picture.
        size: width and height in pixels.
        pixels: [rows, 3, H, W]; None where its file cannot be decoded.
    """

    key: int
    size: tuple[int, int]
    pixels: Any


class Unread(Dataset):
    """Pictures to be opened, by a `DataLoader`'s workers.

    Args:
        dataset: that shows them.
        pictures: of `pictures_of`.
        chosen: which of them.
    """

    def __init__(self, dataset: SupervisedDataset, pictures: Pictures, chosen: np.ndarray):
        self.dataset, self.pictures, self.chosen = dataset, pictures, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Pixels:
        """Raises BadFileError, with the record's name, unless bad files are skipped."""
        number, dataset = int(self.chosen[index]), self.dataset
        record = int(self.pictures.records[number])
        key, medium = int(self.pictures.keys[number]), media_of(dataset.records[record])[self.pictures.places[number]]
        try:
            shown = dataset.files.read(medium)
            images: list[Any] = [shown]
            if isinstance(shown, Video) and dataset.encoder.in_frames:
                images = list(shown.frames)
            size = shown.clip.size if isinstance(shown, Video) else shown.size
            return Pixels(key, size, pixels_of(dataset.encoder.reader, images, bool(self.pictures.alone[number])))
        except BadFileError as error:
            if dataset.bad_files == "skip":
                return Pixels(key, (0, 0), None)
            raise BadFileError(f"{dataset.records.name(record)}: {error}") from error


def pixels_of(reader: Any, shown: list[Any], alone: bool) -> Tensor:
    """[rows, 3, H, W] of images of one size, or of one video. Raises ValueError where the processor joins pictures.

    Args:
        alone: whether they are read as all of a record.
    """
    sample = shown if alone or len(shown) > 1 else shown * 2
    pixels = pixels_in(reader, reader.read([sample]), modality_of(shown[0]))
    if pixels.ndim == 6:
        pixels = tiles_shown(pixels[0])
    elif len(pixels) == 1 < len(sample):  # the row of the sample
        pixels = pixels[0]
    if len(pixels) % len(sample):
        raise ValueError(f"{len(sample)} pictures are {len(pixels)} rows of pixels: none has rows of its own.")
    return in_planes(pixels[: len(pixels) * len(shown) // len(sample)])
