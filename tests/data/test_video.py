# SPDX-License-Identifier: Apache-2.0
"""Videos: which frames, exactly those, and clear errors."""

from __future__ import annotations

import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moellava.data.video import Clip, _stamped, frame_indices, probe_video, read_frames, read_video, video_problem
from moellava.errors import DataError, UserError


@given(st.integers(1, 400), st.data())
def test_frames_are_evenly_spread_over_the_whole_video(total, data):
    count = data.draw(st.integers(1, total))
    indices = frame_indices(total, count)
    assert len(set(indices)) == count and list(indices) == sorted(indices)
    assert indices[0] >= 0 and indices[-1] < total
    if count > 1:
        steps = {after - before for before, after in zip(indices, indices[1:], strict=False)}
        assert (indices[0], indices[-1]) == (0, total - 1) and max(steps) - min(steps) <= 1


def test_frames_by_hand():
    assert frame_indices(10, 4) == (0, 3, 6, 9)
    assert frame_indices(10, 8) == (0, 1, 2, 3, 5, 6, 7, 9)
    assert frame_indices(10, 1) == (4,)


def all_frames(path):
    import av

    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


@pytest.mark.parametrize("name", ["shapes.mp4", "short.mkv", "wide.mp4"])
def test_a_video_gives_the_frames_of_those_numbers(name, clips):
    """Found over key frames, they are those that decoding the whole file gives; and the same every time."""
    frames = all_frames(clips / name)
    for count in range(1, len(frames) + 1):
        video = read_video(clips / name, count)
        assert video.clip.total == len(frames) and video.clip.indices == frame_indices(len(frames), count)
        assert [frame.tobytes() for frame in video.frames] == [frames[i].tobytes() for i in video.clip.indices]
        assert {(frame.mode, frame.size) for frame in video.frames} == {("RGB", video.clip.size)}
    assert video.clip.fps == 4 and video.clip.seconds == len(frames) / 4


@pytest.mark.parametrize("degrees, matrix", [(-90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1)), (90, (0, -1, 1, 0))])
def test_frames_are_turned_as_the_camera_was_held(degrees, matrix, clips, tmp_path):
    """The track's header says it, by a matrix of rows (a b 0) (c d 0) (0 0 1), in units of 1/65536 and 1/2^30."""
    content = bytearray((clips / "wide.mp4").read_bytes())
    begin = content.find(b"tkhd") + 4 + 40
    a, b, c, d = (65536 * entry for entry in matrix)
    content[begin : begin + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(content)
    plain, turned = read_video(clips / "wide.mp4", 3), read_video(tmp_path / "turned.mp4", 3)
    for before, after in zip(plain.frames, turned.frames, strict=True):
        assert after.tobytes() == before.rotate(degrees, expand=True).tobytes()
        assert after.size == turned.clip.size == ((96, 48) if degrees == 180 else (48, 96))


def test_frames_between_are_jumped_over_where_a_key_frame_allows(clips):
    import av

    clip = probe_video(clips / "shapes.mp4", 3)
    keys = [key for _, key in clip.stamps]
    assert keys == sorted(set(keys)), "each has a key frame of its own to begin at"
    decoded = []
    with av.open(str(clips / "shapes.mp4")) as container:

        class Counting:
            seek = container.seek

            def decode(self, stream):
                for frame in container.decode(stream):
                    decoded.append(frame.pts)
                    yield frame

        chosen = [frame.pts for frame in _stamped(Counting(), container.streams.video[0], clip)]
    assert chosen == [time for time, _ in clip.stamps]
    assert len(decoded) < clip.total / 2


def test_a_file_whose_times_prove_wrong_is_counted_through(clips):
    clip = probe_video(clips / "shapes.mp4", 4)
    sound = [frame.tobytes() for frame in read_frames(clips / "shapes.mp4", clip).frames]
    shifted = tuple((time + 1, key) for time, key in clip.stamps)
    for stamps in (shifted, ()):
        again = read_frames(clips / "shapes.mp4", Clip(clip.size, clip.total, clip.fps, clip.indices, stamps))
        assert [frame.tobytes() for frame in again.frames] == sound


@pytest.mark.parametrize(
    "name, count, words",
    [
        ("gone.mp4", 2, "gone.mp4: no such video file"),
        ("text.mp4", 2, "text.mp4: the video cannot be read"),
        ("sound.wav", 2, "sound.wav: the file has no video in it"),
        ("cut.mp4", 2, "cut.mp4: the video cannot be read"),
        ("short.mkv", 4, r"short.mkv: the video has 3 frames but --num_frames asks for 4: ask for at most 3"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(name, count, words, clips):
    with pytest.raises(DataError, match=words):
        read_video(clips / name, count)
    assert video_problem(clips / name, count).startswith(str(clips / name))


def test_damage_in_the_middle_shows_when_every_frame_is_decoded(clips):
    assert "damaged.mp4: the video" in video_problem(clips / "damaged.mp4", 2, in_full=True)
    assert video_problem(clips / "shapes.mp4", 2, in_full=True) is None


def test_a_video_that_ends_early_is_named(clips):
    clip = probe_video(clips / "short.mkv", 2)
    longer = Clip(clip.size, 9, clip.fps, (0, 8))
    with pytest.raises(DataError, match="short.mkv: the video ends before frame 8, though it announces 9 frames"):
        read_frames(clips / "short.mkv", longer)


def test_without_the_package_the_error_says_what_to_install(clips, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"shapes.mp4 is a video, which needs the package av: pip install"):
        video_problem(clips / "shapes.mp4", 2)


def test_av_is_imported_only_when_there_is_a_video():
    code = "import sys, moellava.data.media; sys.exit('av' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
