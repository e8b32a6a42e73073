# SPDX-License-Identifier: Apache-2.0
"""Video files: which frames are looked at, and those frames as images. Read with PyAV, which is imported when needed.

video     0 1 2 3 4 5 6 7 8 9      F = 10 frames
chosen    0     3     6     9      N = 4 of them
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from PIL import Image

from moellava.data.decoding import decoding, require_file
from moellava.data.images import USUAL_LIMITS, Limits
from moellava.errors import BadFileError, DataError, UserError

if TYPE_CHECKING:
    import av

USUAL_FPS = 24.0
"""Frames a second of a file that does not say, as transformers assumes it."""

T = TypeVar("T")


@dataclass(frozen=True)
class Clip:
    """What is known of a video before its frames are decoded.

    Attributes:
        size: width and height in pixels, upright.
        total: frames of the whole video.
        fps: its frames a second.
        indices: the chosen frames, from 0. See `frame_indices`.
        stamps: for each of them (its own time, the time of the key frame to decode from), in the stream's unit; ()
            where the file does not stamp its frames, so that they have to be counted.
    """

    size: tuple[int, int]
    total: int
    fps: float
    indices: tuple[int, ...]
    stamps: tuple[tuple[int, int], ...] = ()

    @property
    def seconds(self) -> float:
        """Duration of the whole video."""
        return self.total / self.fps


@dataclass(frozen=True)
class Video:
    """The chosen frames of a video.

    Attributes:
        clip: where they come from.
        frames: RGB images, one for each of `clip.indices`.
    """

    clip: Clip
    frames: tuple[Image.Image, ...]


def frame_indices(total: int, count: int) -> tuple[int, ...]:
    """The frames that stand for a video: frame i of N is floor(i · (F - 1) / (N - 1)) of F, so that the first and the
    last are among them and the distances differ by one frame at most. A single one is the middle, floor((F - 1) / 2).

    Args:
        total: F, frames of the video.
        count: N, frames wanted, from 1 to F.
    """
    if count == 1:
        return ((total - 1) // 2,)
    return tuple(number * (total - 1) // (count - 1) for number in range(count))


@contextmanager
def _opened(path: str | Path, limits: Limits) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """A video file and its first video stream.

    Raises:
        BadFileError: the file is missing or damaged, has no video in it, or one whose frames are beyond the limits;
            also for what fails inside.
        UserError: the package av is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise UserError(f"{path} is a video, which needs the package av: pip install 'moellava[video]'") from error
    with decoding(path, "video", av.error.FFmpegError):
        require_file(path, "video")
        with av.open(str(path), metadata_errors="replace") as container:  # its title may be of any encoding
            if not container.streams.video:
                raise BadFileError(f"{path}: the file has no video in it")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise BadFileError(f"{path}: FFmpeg has no decoder for its video")
            if stream.width and stream.height:  # else its first frame tells
                limits.check((stream.width, stream.height), path)
            yield container, stream


def probe_video(path: str | Path, count: int, limits: Limits = USUAL_LIMITS) -> Clip:
    """Which frames of a file stand for it. Its packets are read, and its first frame is decoded.

    Args:
        path: any file that FFmpeg reads.
        count: frames wanted, at least 1.
        limits: how large its frames may be.

    Raises:
        BadFileError: the file is missing, no video, damaged, beyond the limits, or has fewer frames than wanted.
        UserError: the package av is not installed.
    """
    size = _size_of(path, limits)
    with _opened(path, limits) as (container, stream):
        times, keys, unstamped, hidden = array("q"), array("q"), 0, 0
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.is_discard:
                hidden += 1
            elif packet.pts is None:
                unstamped += 1
            else:
                times.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
        total = len(times) + unstamped
        if total + hidden < stream.frames:
            raise BadFileError(
                f"{path}: the video is cut short: {total + hidden} of its {stream.frames} frames are there"
            )
        if count > total:
            raise BadFileError(
                f"{path}: the video has {total} frames but --num_frames asks for {count}: ask for at most {total} (in "
                "training, --bad_files skip leaves its records out)"
            )
        indices = frame_indices(total, count)
        ordered = array("q", sorted(times))
        stamps: tuple[tuple[int, int], ...] = ()
        if not unstamped and len(set(ordered)) == total and keys and keys[0] == ordered[0]:
            stamps = tuple((ordered[i], keys[bisect_right(keys, ordered[i]) - 1]) for i in indices)
        return Clip(size, total, _fps(stream, ordered), indices, stamps)


def read_frames(path: str | Path, clip: Clip, limits: Limits = USUAL_LIMITS) -> Video:
    """The chosen frames of a file, upright and of one size, decoded from the key frames before them. At most they and
    one more are in memory.

    Args:
        path: the file.
        clip: of `probe_video`.
        limits: how large its frames may be.

    Raises:
        BadFileError: the file cannot be decoded, or ends before the last of them.
        UserError: the package av is not installed.
    """
    return Video(clip, tuple(_each(path, clip, limits, partial(_upright, size=clip.size))))


def read_video(path: str | Path, count: int, limits: Limits = USUAL_LIMITS) -> Video:
    """`count` frames of a file, evenly spread over it. Raises as `probe_video` and `read_frames` do."""
    return read_frames(path, probe_video(path, count, limits), limits)


def video_problem(path: str | Path, count: int, in_full: bool = False, limits: Limits = USUAL_LIMITS) -> str | None:
    """What is wrong with a video file, or None.

    Args:
        path: the file.
        count: frames wanted of it.
        in_full: decode every frame. Otherwise only the first of those wanted is, and the others are only counted.
        limits: how large its frames may be.

    Raises:
        UserError: the package av is not installed.
    """
    try:
        clip = probe_video(path, count, limits)
        if in_full:
            clip = replace(clip, indices=tuple(range(clip.total)), stamps=())
        else:
            clip = replace(clip, indices=clip.indices[:1], stamps=clip.stamps[:1])
        _each(path, clip, limits, lambda frame: None)
    except DataError as error:
        return str(error)
    return None


def _each(path: str | Path, clip: Clip, limits: Limits, take: Callable[[av.VideoFrame], T]) -> list[T]:
    """`take` of each chosen frame: by their times, or else, where the times prove wrong, by their numbers."""
    for walk in (_stamped, _counted) if clip.stamps else (_counted,):
        with _opened(path, limits) as (container, stream):
            stream.codec_context.thread_count = 1  # samples are read side by side already
            taken = []
            for frame in walk(container, stream, clip):
                limits.check((frame.width, frame.height), path)
                taken.append(take(frame))
        if len(taken) == len(clip.indices):
            return taken
    lost = clip.indices[len(taken)]
    raise BadFileError(f"{path}: the video ends before frame {lost}, though it announces {clip.total} frames")


def _upright(frame: av.VideoFrame, size: tuple[int, int]) -> Image.Image:
    """A frame as an image, turned as the file says that its camera was held; of the size of the first one, which a
    recording may leave as it goes on."""
    image = frame.to_image().rotate(frame.rotation, expand=True)
    return image if image.size == size else image.resize(size)


def _size_of(path: str | Path, limits: Limits) -> tuple[int, int]:
    """Width and height of the upright frames; only a frame tells how it is to be turned."""
    with _opened(path, limits) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise BadFileError(f"{path}: the video has no frame")
        limits.check((frame.width, frame.height), path)
        return (frame.width, frame.height) if frame.rotation % 180 == 0 else (frame.height, frame.width)


def _fps(stream: av.VideoStream, times: array[int]) -> float:
    rate = stream.average_rate or stream.guessed_rate
    if not rate and stream.time_base and len(times) > 1 and times[-1] > times[0]:
        rate = Fraction(len(times) - 1, times[-1] - times[0]) / stream.time_base
    return float(rate or USUAL_FPS)


def _stamped(container: av.container.InputContainer, stream: av.VideoStream, clip: Clip) -> Iterator[av.VideoFrame]:
    """The chosen frames by their times, over key frames where that leaves something out. Ends early at a time that no
    frame has: after a seek, some formats go on later than they were told to."""
    decoded, position = container.decode(stream), -math.inf
    for index, (time, key) in zip(clip.indices, clip.stamps, strict=True):
        if index and key > position:
            container.seek(key, stream=stream)
            decoded = container.decode(stream)
        frame = next((frame for frame in decoded if frame.pts is None or frame.pts >= time), None)
        if frame is None or frame.pts != time:
            return
        position = time
        yield frame


def _counted(container: av.container.InputContainer, stream: av.VideoStream, clip: Clip) -> Iterator[av.VideoFrame]:
    """The chosen frames by their numbers, from the beginning."""
    wanted = iter(clip.indices)
    following = next(wanted)
    for number, frame in enumerate(container.decode(stream)):
        if number == following:
            yield frame
            following = next(wanted, -1)
            if following < 0:
                return
