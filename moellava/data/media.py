# SPDX-License-Identifier: Apache-2.0
"""The images and videos that records show: where they lie, what is wrong with them, and what is in them.

For a model without a way for videos, a video is its frames: `<video>` in a question becomes as many `<image>`s.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any

from PIL import Image

from moellava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN, MODALITIES
from moellava.data.embedded import TO_FILES, Embedded, is_embedded, is_part
from moellava.data.embedded import opened as opened_uri
from moellava.data.images import USUAL_LIMITS, Limits, image_problem, image_size, normalised, open_image
from moellava.data.records import ROLES, Medium, Source
from moellava.data.remembered import Remembered
from moellava.data.remote import Distant, RemoteFile, RemoteFolder, fetch_together, is_remote
from moellava.data.shard_parts import ShardPart
from moellava.data.video import Clip, Video, probe_video, read_frames, video_problem
from moellava.errors import BadFileError, DataError, UserError

CHECKING_THREADS = 8
"""Files that are looked at side by side; the wait is for the disk."""

CLIPS_KEPT = 16384
"""Videos whose chosen frames are remembered, so that their packets are read once."""

NUM_FRAMES = 8
"""Frames of a video, unless --num_frames says otherwise."""

NO_FOLDER = "no --{}_folder is given, which such paths are relative to"

_VIDEO_TAG = re.compile(re.escape(DEFAULT_VIDEO_TOKEN))


class MediaFiles:
    """The images and videos of records: files by their paths, or, in a chat, what has been opened already.

    Args:
        image_folder: what image paths are relative to.
        video_folder: what video paths are relative to; None: the same folder.
        num_frames: frames that stand for a video.
        limits: how large an image, or a frame of a video, may be.
        confined: whether a path that leads out of its folder is a problem, by `..`, from `/` or through a link.
    """

    def __init__(
        self,
        image_folder: str | Path | None = None,
        video_folder: str | Path | None = None,
        num_frames: int = NUM_FRAMES,
        limits: Limits = USUAL_LIMITS,
        confined: bool = False,
    ):
        self.image_folder = folder_named(image_folder or "")
        self.video_folder = folder_named(video_folder) if video_folder else self.image_folder
        self.num_frames = num_frames
        self.limits = limits
        self.confined = confined
        self._probed = Remembered(self._probe, CLIPS_KEPT)

    def folder_of(self, modality: str) -> Path | RemoteFolder:
        """What paths of a modality are relative to."""
        return self.image_folder if modality == "image" else self.video_folder

    @property
    def settings(self) -> list[Any]:
        """All that decides over what is found in a file, as JSON."""
        folders = [place_of(self.folder_of(modality)) for modality in MODALITIES]
        return [*folders, self.num_frames, astuple(self.limits), self.confined]

    def file_of(self, medium: Medium) -> Path | RemoteFile:
        """Where an image or a video lies. Raises DataError where the record holds it itself, or where it lies outside
        its folder and may not, or is a video that lies elsewhere."""
        if is_embedded(medium.path):
            raise DataError(f"an embedded {medium.modality} lies in no file, and here it has to: {TO_FILES}")
        folder = self.folder_of(medium.modality)
        path = folder / medium.path
        if self.confined and not within(path, folder):
            raise DataError(f"{path}: lies outside {folder or Path()}, which --confine_media forbids")
        if isinstance(path, RemoteFile) and medium.modality == "video":
            raise DataError(f"{path}: videos are read from this machine's disks: copy them, and name --video_folder")
        return path

    def local(self, medium: Medium) -> Path:
        """The same of a file on this machine's disks."""
        path = self.file_of(medium)
        assert isinstance(path, Path), "only images are fetched"
        return path

    def problem(self, medium: Medium, in_full: bool = False) -> str | None:
        """What is wrong with its file, or None; for `in_full` see `image_problem` and `video_problem`."""
        try:
            content = self._content(medium)
        except DataError as error:
            return str(error)
        if isinstance(content, Embedded):
            return image_problem(content, True, self.limits)
        if isinstance(content, Distant):
            return remote_problem(content, in_full, self.limits)
        if medium.modality == "image":
            found = image_problem(content, in_full, self.limits)
        else:
            found = video_problem(content, self.num_frames, in_full, self.limits)
        forgotten = (
            found and self.folder_of(medium.modality) == Path() and not content.is_absolute() and not content.exists()
        )
        return f"{found} ({NO_FOLDER.format(medium.modality)})" if forgotten else found

    def _fetched(self, medium: Medium) -> Path | Embedded:
        """As `_content`, of an image that lies elsewhere its content. Raises BadFileError where it cannot be read."""
        content = self._content(medium)
        return content.fetched() if isinstance(content, Distant) else content

    def fetch_ahead(self, media: Iterable[Medium]) -> None:
        """Fetches images that lie elsewhere, side by side, for whoever reads them next."""
        images = dict.fromkeys(medium for medium in media if medium.modality == "image")
        shown = [self._content(one) for one in images if is_part(one.path) or not is_embedded(one.path)]
        fetch_together([content for content in shown if isinstance(content, Distant)])

    def _content(self, medium: Medium) -> Path | Embedded | Distant:
        """Where a medium lies, or the content of an image that its record holds. Raises DataError: see `file_of`."""
        if medium.modality == "image" and is_embedded(medium.path):
            return ShardPart(medium.path) if is_part(medium.path) else opened_uri(medium.path)
        return self.file_of(medium)

    def problems(self, media: Iterable[Medium], in_full: bool = False) -> dict[Medium, str]:
        """What is wrong with files, for those that something is wrong with; each is looked at once."""
        distinct = list(dict.fromkeys(media))
        found = threaded(lambda medium: self.problem(medium, in_full), distinct)
        return {medium: problem for medium, problem in zip(distinct, found, strict=True) if problem}

    def clip(self, medium: Medium) -> Clip:
        """Which frames of a video are shown. Raises BadFileError: see `probe_video`."""
        if isinstance(medium.path, Video):
            return medium.path.clip
        return self._probed(medium)

    def _probe(self, medium: Medium) -> Clip:
        return probe_video(self.local(medium), self.num_frames, self.limits)

    def frames_of(self, medium: Medium) -> int:
        """Images that an image or a video is, where a video is its frames."""
        if medium.modality == "image":
            return 1
        return len(medium.path.frames) if isinstance(medium.path, Video) else self.num_frames

    def size(self, medium: Medium) -> tuple[int, int]:
        """Width and height in pixels, upright. Raises BadFileError where the file cannot be read."""
        if medium.modality == "video":
            return self.clip(medium).size
        if isinstance(medium.path, Image.Image):
            return normalised(medium.path, self.limits).size
        return image_size(self._fetched(medium), self.limits)

    def read(self, medium: Medium) -> Image.Image | Video:
        """An image as `normalised` shows it, or the shown frames of a video. Raises BadFileError: see `open_image` and
        `read_frames`."""
        if isinstance(medium.path, Video):
            return medium.path
        if isinstance(medium.path, Image.Image):
            return normalised(medium.path, self.limits)
        if medium.modality == "image":
            return open_image(self._fetched(medium), self.limits)
        return read_frames(self.local(medium), self.clip(medium), self.limits)


def threaded(look: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """What `look` finds in each item, several at a time."""
    with ThreadPoolExecutor(CHECKING_THREADS) as pool:
        return list(pool.map(look, items))


def folder_named(name: str | Path) -> Path | RemoteFolder:
    """A folder, or one that lies elsewhere. Raises UserError: see `RemoteFolder`."""
    return RemoteFolder(str(name)) if is_remote(name) else Path(name)


def place_of(folder: Path | RemoteFolder) -> str:
    """What stays the same of a folder whatever the working folder is."""
    return str(folder) if isinstance(folder, RemoteFolder) else os.path.abspath(folder)


def remote_problem(file: Distant, in_full: bool, limits: Limits) -> str | None:
    """What is wrong with an image that lies elsewhere or in a shard, or None. Not `in_full`: of one that lies elsewhere
    whether it is there, as its folder's list says."""
    if file.state is None:
        return f"{file}: no such image file"
    try:
        return image_problem(file.fetched(), in_full, limits) if in_full or file.is_near else None
    except BadFileError as error:
        return str(error)


def within(path: Path | RemoteFile, folder: Path | RemoteFolder) -> bool:
    """Whether a path leads into a folder once `..` and links are followed; a path that cannot be followed does not."""
    if isinstance(path, RemoteFile) or isinstance(folder, RemoteFolder):
        return isinstance(path, RemoteFile) and not posixpath.normpath(path.path).startswith("..")
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except (OSError, ValueError):  # a null character, a circle of links
        return False


def require_frames(num_frames: int, flag: str) -> None:
    """Raises UserError, naming the flag, where a video would be no frames at all."""
    if num_frames < 1:
        raise UserError(f"{flag} {num_frames}: a video is at least 1 frame.")


def with_frames(source: Source, counts: Sequence[int]) -> Source:
    """A conversation whose questions show the frames of each video, one `<image>` a frame.

    Args:
        source: turns.
        counts: frames of each video, in the order of their tags.
    """
    remaining = iter(counts)
    return [
        turn | {"value": _VIDEO_TAG.sub(lambda _: DEFAULT_IMAGE_TOKEN * next(remaining, 1), turn["value"])}
        if turn["from"] == ROLES[0]
        else turn
        for turn in source
    ]
