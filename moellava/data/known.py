# SPDX-License-Identifier: Apache-2.0
"""Pictures of which is known what the model is shown: they are neither decoded nor brought to the tower's shape.

A picture's key is made of the digest of its file, and of what else decides over its pixels: how many frames of a video
are shown, and whether an image is alone in its record, where a processor cuts only such a one into tiles. What
is known are its pixels, [rows, 3, H, W], or the tower's features of them: these stand in the place of pixels as a
picture of one channel, [rows, 1, P, D], which the tower hands on (`model/known_tower.py`). Where a processor gives
numbers of patches [P, D], a row is one patch, [P, 3, 1, D / 3]. All else that a processor gives for a picture, it gives
for a blank of its size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from moellava.data.digests import digest_of
from moellava.data.embedded import digest_of_held, is_embedded
from moellava.data.encoder import Encoder
from moellava.data.feature_store import FeatureStore
from moellava.data.findings import KEY, findings
from moellava.data.media import MediaFiles
from moellava.data.media_reader import (
    BLANK,
    SIZES_KEPT,
    WIDE,
    Media,
    MediaReader,
    Shown,
    blank,
    modality_of,
    of_blanks,
)
from moellava.data.nested import Rows, stacked, thrifty
from moellava.data.records import Medium
from moellava.data.remembered import Remembered
from moellava.data.remote import Distant
from moellava.data.scan import shared, slices_of
from moellava.data.shown import SLICE, looked_up, scattered, states_of
from moellava.data.shown import Shown as ShownMedia
from moellava.data.video import USUAL_FPS, Clip, Video
from moellava.errors import BadFileError

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""Modality -> the input that holds its pixels, where it is not that of images for both."""

CONTENT_ROW = np.dtype([(KEY, "<u8"), ("content", "<u8")])
"""What is kept of a file: its state -> the digest of its content."""


@dataclass(frozen=True)
class Known:
    """An image of which is known what the model is shown.

    Attributes:
        size: width and height in pixels.
        place: in the store.
        part: which of so many equal parts of the rows there are its own: a video's frames stand together.
    """

    size: tuple[int, int]
    place: int
    part: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class KnownVideo(Video):
    """The same of a video, for a model that has a way for videos."""

    place: int = 0


class Contents:
    """Digests of the files of media by the state that they are in, so that a file that stays is read once."""

    def __init__(self, shown: ShownMedia, files: MediaFiles):
        kept = findings("contents", list, CONTENT_ROW, len(shown))
        numbers = np.flatnonzero(shown.in_file)
        found = shared(slices_of(numbers, SLICE), lambda part: [self._look(shown, one, files, kept) for one in part])
        rows = np.concatenate([np.empty(0, CONTENT_ROW), *found])
        known_by_state = rows[rows[KEY] != 0]
        # What could not be read is read again, since a permission may change and the state stay.
        read = known_by_state[known_by_state["content"] != 0]
        kept.add(read[kept.known(read[KEY])[0] == 0])
        self.of_media = np.zeros(len(shown), np.uint64)
        self.of_media[numbers] = rows["content"]
        self.of_media[~shown.in_file] = shown.embedded()
        known_by_state.sort(order=KEY)
        self._states, self._contents = known_by_state[KEY], known_by_state["content"]
        self.files = files

    @staticmethod
    def _look(shown: ShownMedia, numbers: np.ndarray, files: MediaFiles, kept: Any) -> np.ndarray:
        """Rows of some media, in their order."""
        rows = np.empty(len(numbers), CONTENT_ROW)
        for begin, media in shown.slices(numbers):
            place = slice(begin, begin + len(media))
            rows[KEY][place], rows["content"][place], _ = looked_up(media, files, kept, "content", content_of_file)
        return rows

    def of(self, medium: Medium) -> int:
        """Of one medium."""
        if is_embedded(medium.path):
            return digest_of_held(medium.path)
        (state,) = states_of([medium], self.files)
        place = np.searchsorted(self._states, state)
        if place < len(self._states) and self._states[place] == state:
            return int(self._contents[place])
        return content_of_file(self.files.file_of(medium))


def content_of_file(path: Path | Distant) -> int:
    """64 bits of a file's content; 0 where it cannot be read: whoever decodes it says why."""
    try:
        return digest_of(path.read_bytes())
    except (OSError, ValueError):
        return 0


def keys_of(contents: np.ndarray, variants: np.ndarray) -> np.ndarray:
    """Keys of pictures, uint64 [N], from the digests of their files [N] and their variants [N]. See `variant`."""
    return scattered(contents ^ scattered(variants.astype(np.uint64) + np.uint64(1)))


def variant(is_video: Any, alone: Any, num_frames: int) -> Any:
    """What decides over the pixels of a file beside its content: of one, or of many in arrays."""
    return 2 * num_frames * is_video + alone


def key_of(content: int, modality: str, alone: bool, num_frames: int) -> int:
    """Of one picture."""
    return int(keys_of(np.array([content], np.uint64), np.array([variant(modality == "video", alone, num_frames)]))[0])


def key_of_blank(modality: str) -> int:
    """Of what stands in where a batch shows nothing."""
    return key_of(digest_of(f"a blank {modality}".encode()), modality, True, 0)


class KnownMedia:
    """What records show, as pictures that are known. It takes the place of opening files.

    Args:
        store: holds what is known.
        contents: digests of the files.
        encoder: of the model.
    """

    def __init__(self, store: FeatureStore, contents: Contents, encoder: Encoder):
        self.store, self.contents, self.encoder = store, contents, encoder
        self.files = contents.files

    def read(self, media: Sequence[Medium]) -> list[Shown]:
        """The media of a sample. Raises BadFileError: a file cannot be read, or is another one than at the start."""
        alone = self.are_alone(media)
        return [one for medium in media for one in self._read(medium, alone)]

    def are_alone(self, media: Sequence[Medium]) -> bool:
        """Whether an image among them is read as one that is alone in its sample."""
        in_frames = self.encoder.in_frames
        count = sum(self.files.frames_of(one) for one in media if in_frames or one.modality == "image")
        return not self.encoder.reader.needs_sizes or count == 1

    def _read(self, medium: Medium, alone: bool) -> list[Any]:
        as_video = medium.modality == "video" and not self.encoder.in_frames
        key = key_of(self.contents.of(medium), medium.modality, alone or as_video, self.files.num_frames)
        place = self.store.place(key)
        if place is None:
            self.files.read(medium)
            raise BadFileError(f"{self.files.file_of(medium)}: the file has changed since this run looked at it")
        if as_video:
            return [KnownVideo(self.files.clip(medium), (), place)]
        size, count = self.store.size(place), self.files.frames_of(medium)
        return [Known(size, place, (number, count)) for number in range(count)]


class KnownReader:
    """Reads media that are known: runs, and what the model is shown of them. See `MediaReader.read`.

    Args:
        reader: of the model's processor.
        store: holds what is known, of blanks too.
        shown: what the model is shown, [rows, C, H, W], of what the store holds of a picture, [rows, P, D].

    Raises:
        ValueError: the pictures of a sample stand in one row, and what the processor makes of one depends on another.
    """

    def __init__(self, reader: MediaReader, store: FeatureStore, shown: Callable[[torch.Tensor], torch.Tensor]):
        self.reader, self.store, self.shown = reader, store, shown
        self._beside = Remembered(self._without_pixels, SIZES_KEPT)
        self._of_two = Remembered(self._first_of_two, SIZES_KEPT)
        self.rows = rows_of(reader)
        sizes = (BLANK, WIDE, WIDE)
        self.is_divisible = reader.needs_sizes and alike(self._in_parts(*sizes), self._without_pixels(*sizes))
        """Whether what the processor gives beside the pixels of a sample is that of its pictures one by one, so that
        not every combination of sizes has to be asked for."""
        if self.rows and not self.is_divisible:
            raise ValueError("the pictures of a sample depend on each other")
        blanks = {input_of(reader, name): blank(name) for name in reader.placeholders}
        self.axes = {name: reader.read([[shown]]).tensors[name].ndim for name, shown in blanks.items()}

    def __getattr__(self, name: str) -> Any:
        """What else a collator asks a reader for."""
        if name == "reader":  # not there yet, while a copy is made
            raise AttributeError(name)
        return getattr(self.reader, name)

    def read(self, samples: Sequence[Sequence[Any]], name: str = "the batch") -> Media:
        """Runs and tensors of samples, none of them without media."""
        if self.rows:
            return self._read_in_rows(samples, self.rows)
        beside = self._in_parts if self.is_divisible else self._beside
        found = joined([beside(*map(self._essence, sample)) for sample in samples])
        rows: dict[str, list[torch.Tensor]] = {}
        for one in chain.from_iterable(samples):
            rows.setdefault(input_of(self.reader, modality_of(one)), []).append(self.shown(self._kept(one)))
        pixels = {name: put_together(pictures, self.axes[name]) for name, pictures in rows.items()}
        return Media(found.runs, found.tensors | pixels)

    def _read_in_rows(self, samples: Sequence[Sequence[Any]], rows: Rows) -> Media:
        runs, units = [], []
        for sample in samples:
            parts = self._parts(*map(self._essence, sample))
            runs.append([run for part in parts for run in part.runs[0]])
            units.append([(modality_of(one), one, part.tensors) for one, part in zip(sample, parts, strict=True)])
        tensors: dict[str, torch.Tensor] = {}
        for groups in rows.groups(units, self.reader.is_one_input):
            tensors |= rows.beside([[unit for *_, unit in row] for row in groups])
            kept = [[self._kept(one) for _, one, _ in row] for row in groups]
            tensors[input_of(self.reader, groups[0][0][0])] = rows.pixels(kept, self.shown)
        return Media(runs, tensors)

    def _parts(self, *shown: Any) -> list[Media]:
        """`_without_pixels` of each picture of a sample, where it is that of the sample."""
        is_only = sum(not isinstance(one, Clip) for one in shown) == 1
        return [self._beside(one) if is_only or isinstance(one, Clip) else self._of_two(one) for one in shown]

    def _in_parts(self, *shown: Any) -> Media:
        """`_without_pixels`, put together of what is known of each."""
        found = joined(self._parts(*shown))
        return Media([list(chain.from_iterable(found.runs))], found.tensors)

    def _first_of_two(self, shown: Any) -> Media:
        both = self._without_pixels(shown, shown)
        return Media([both.runs[0][:1]], {name: value[: len(value) // 2] for name, value in both.tensors.items()})

    def _without_pixels(self, *shown: Any) -> Media:
        """What the processor makes of blanks of these sizes and clips, in one sample, whose row it is."""
        sample = [of_blanks(one) if isinstance(one, Clip) else Image.new("RGB", one) for one in shown]
        media = self.reader.read([sample])
        beside = beside_pixels(media)
        return Media(media.runs, {name: thrifty(one[0]) for name, one in beside.items()} if self.rows else beside)

    def _essence(self, shown: Any) -> Any:
        """What decides over all that a processor gives but pixels: a size, or a clip."""
        if isinstance(shown, Video):
            clip, count = shown.clip, len(shown.clip.indices)
            size = clip.size if self.reader.needs_sizes else BLANK
            if self.reader.is_timed or self.reader.gives_times:
                return Clip(size, clip.total, clip.fps, clip.indices)
            return Clip(size, count, USUAL_FPS, tuple(range(count)))
        return shown.size if self.reader.needs_sizes else BLANK

    def _kept(self, shown: Any) -> torch.Tensor:
        """[rows, P, D] of one image or video."""
        if isinstance(shown, KnownVideo):
            return self.store.features(shown.place)
        if isinstance(shown, Known):
            number, count = shown.part
            return self.store.features(shown.place).chunk(count)[number]
        place = self.store.place(key_of_blank(modality_of(shown)))
        assert place is not None, "a batch shows what is known, or blanks"
        return self.store.features(place)


def joined(parts: Sequence[Media]) -> Media:
    """Samples, or pictures, one behind the other."""
    names = dict.fromkeys(name for part in parts for name in part.tensors)
    tensors = {name: torch.cat([part.tensors[name] for part in parts if name in part.tensors]) for name in names}
    return Media([runs for part in parts for runs in part.runs], tensors)


def alike(one: Media, other: Media) -> bool:
    """Whether both are the same runs and tensors, to the bit."""
    names = one.tensors.keys()
    if one.runs != other.runs or names != other.tensors.keys():
        return False
    return all(torch.equal(one.tensors[name], other.tensors[name]) for name in names)


def input_of(reader: Any, modality: str) -> str:
    """The input of the model that holds pixels of a modality."""
    return PIXELS["image" if reader.is_one_input else modality]


def pixels_in(reader: Any, media: Media, modality: str) -> torch.Tensor:
    """The pixels of what was read."""
    return media.tensors[input_of(reader, modality)]


def beside_pixels(media: Media) -> dict[str, torch.Tensor]:
    """All inputs but pixels."""
    return {name: one for name, one in media.tensors.items() if name not in PIXELS.values()}


def in_planes(pixels: torch.Tensor) -> torch.Tensor:
    """[rows, 3, H, W] of pixels as processors give them: tiles [rows, 3, H, W], pictures of several tiles [N, R, 3, H,
    W], patches [rows, D] whose numbers are those of one channel behind those of another."""
    if pixels.ndim == 2:
        return pixels.unflatten(1, (3, 1, -1))
    return pixels.flatten(0, 1) if pixels.ndim == 5 else pixels


def put_together(pictures: Sequence[torch.Tensor], axes: int) -> torch.Tensor:
    """Pictures [rows, C, H, W] as one input of so many axes: the other way round of `in_planes`."""
    if axes == 5:
        return stacked([[one] for one in pictures], 0)
    rows = torch.cat(list(pictures))
    return rows.flatten(1) if axes == 2 else rows


def rows_of(reader: Any) -> Rows | None:
    """How a processor fills the rows of samples; None where every picture has rows of its own."""
    one, name = blank("image"), input_of(reader, "image")
    inputs = reader.read([[one], [one, one]]).tensors
    return Rows(inputs, name) if len(inputs[name]) == 2 else None
