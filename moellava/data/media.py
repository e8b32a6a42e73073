"""The files that records show: where they lie, what is wrong with them, and what is in them.

In a composed model a video is its frames: `<video>` in a question becomes as many `<image>`s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from moellava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN
from moellava.data.images import image_problem, open_image
from moellava.data.records import ROLES, Medium, Source, media_of
from moellava.data.video import Clip, Video, probe_video, read_frames, video_problem
from moellava.errors import UserError

CHECKING_THREADS = 8
"""Files that are looked at side by side; the wait is for the disk."""

CLIPS_KEPT = 16384
"""Videos whose chosen frames are remembered, so that their packets are read once."""

NUM_FRAMES = 8
"""Frames of a video, unless --num_frames says otherwise."""


class MediaFiles:
    """The images and videos of records.

    Args:
        image_folder: what image paths are relative to.
        video_folder: what video paths are relative to; None: the same folder.
        num_frames: frames that stand for a video.
    """

    def __init__(
        self,
        image_folder: str | Path | None = None,
        video_folder: str | Path | None = None,
        num_frames: int = NUM_FRAMES,
    ):
        self.image_folder = Path(image_folder or "")
        self.video_folder = Path(video_folder) if video_folder else self.image_folder
        self.num_frames = num_frames
        self._clips: dict[str, Clip] = {}  # no `lru_cache`, which spawned workers could not be sent

    def file_of(self, medium: Medium) -> Path:
        """Where an image or a video lies."""
        return (self.image_folder if medium.kind == "image" else self.video_folder) / medium.path

    def problem(self, medium: Medium, in_full: bool = False) -> str | None:
        """What is wrong with its file, or None; `in_full` as of `image_problem` and `video_problem`."""
        if medium.kind == "image":
            return image_problem(self.file_of(medium), in_full)
        return video_problem(self.file_of(medium), self.num_frames, in_full)

    def problems(self, media: Iterable[Medium], in_full: bool = False) -> dict[Medium, str]:
        """What is wrong with files, for those that something is wrong with; each is looked at once."""
        distinct = list(dict.fromkeys(media))
        with ThreadPoolExecutor(CHECKING_THREADS) as pool:
            found = pool.map(lambda medium: self.problem(medium, in_full), distinct)
            return {medium: problem for medium, problem in zip(distinct, found, strict=True) if problem}

    def clip(self, medium: Medium) -> Clip:
        """Which frames of a video are shown. Raises DataError as `probe_video` does."""
        if medium.path not in self._clips:
            if len(self._clips) == CLIPS_KEPT:
                self._clips.clear()
            self._clips[medium.path] = probe_video(self.file_of(medium), self.num_frames)
        return self._clips[medium.path]

    def read(self, medium: Medium) -> Image.Image | Video:
        """An image, or the shown frames of a video. Raises DataError as `open_image` and `read_frames` do."""
        if medium.kind == "image":
            return open_image(self.file_of(medium))
        return read_frames(self.file_of(medium), self.clip(medium))

    def pictures(self, media: Iterable[Medium]) -> list[Image.Image]:
        """Images and the frames of videos, in order. Raises as `read` does."""
        return [picture for medium in media for picture in pictures_of(self.read(medium))]


def require_frames(num_frames: int, flag: str) -> None:
    """Raises UserError, naming the flag, where a video would be no frames at all."""
    if num_frames < 1:
        raise UserError(f"{flag} {num_frames}: a video is at least 1 frame.")


def pictures_of(shown: Image.Image | Video) -> Sequence[Image.Image]:
    """The images that stand for what is shown: itself, or the frames of a video."""
    return shown.frames if isinstance(shown, Video) else (shown,)


def with_frames(source: Source, num_frames: int) -> Source:
    """A conversation whose questions show the frames of each video, one `<image>` a frame."""
    frames = DEFAULT_IMAGE_TOKEN * num_frames
    return [
        turn | {"value": turn["value"].replace(DEFAULT_VIDEO_TOKEN, frames)} if turn["from"] == ROLES[0] else turn
        for turn in source
    ]


def frame_counts(record: dict[str, Any], num_frames: int) -> list[int]:
    """How many images each image or video of a record is, in the order of their tags."""
    return [1 if medium.kind == "image" else num_frames for medium in media_of(record)]
