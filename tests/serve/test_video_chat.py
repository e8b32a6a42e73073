# SPDX-License-Identifier: Apache-2.0
"""Chat about videos: a composed model sees the frames, in the place of the tag."""

from __future__ import annotations

import io

import pytest

from moellava.commands import chat as cli
from moellava.data.dataset import opened
from moellava.data.media import MediaFiles
from moellava.data.video import read_video
from moellava.errors import DataError, UserError
from moellava.serve.answer import answer, stream
from moellava.serve.generate import Sampling
from moellava.serve.prompt import Request

FRAMES = 3


@pytest.fixture
def videos(clips):
    return [read_video(clips / name, FRAMES) for name in ("shapes.mp4", "wide.mp4")]


def test_a_video_is_asked_about_as_its_frames_are(composed, videos, pictures):
    shown = Request("first <video> then <image> then <video>", [pictures[0]], videos=videos)
    frames = [*videos[0].frames, pictures[0], *videos[1].frames]
    tags = "<image>" * FRAMES
    spelled = Request(f"first {tags} then <image> then {tags}", frames)
    ours, theirs = (composed.encoder.encode(request.record, opens=True) for request in (shown, spelled))
    assert (ours.ids, ours.length) == (theirs.ids, theirs.length)
    seen = opened(ours.media, composed.encoder, MediaFiles())
    assert seen[:FRAMES] + seen[-FRAMES:] == [*videos[0].frames, *videos[1].frames] and len(seen) == len(frames)
    said = answer(composed, [shown, spelled, Request("hello")], max_new_tokens=8)
    assert said[0] == said[1] == "".join(stream(composed, shown, Sampling(max_new_tokens=8)))


def test_tags_are_put_in_front_and_counted(composed, videos, pictures):
    def prompt(request: Request) -> str:
        return "".join(piece.text for piece in composed.encoder.pieces(request.record, opens=True))

    both = Request("what?", [pictures[0]], videos=videos)
    assert both.messages[0]["value"] == "<video>\n<video>\n<image>\nwhat?"
    assert "USER: " + "<image>" * 3 + "\n" + "<image>" * 3 + "\n<image>\nwhat? ASSISTANT:" in prompt(both)
    assert prompt(Request("no video")).endswith("USER: no video ASSISTANT:")
    with pytest.raises(UserError, match="The request has 2 videos but 1 <video> tags: 'one <video>'"):
        Request("one <video>", videos=videos)


def test_a_conversation_remembers_videos(composed, clips, pictures):
    chat = cli.Chat(composed, Sampling(max_new_tokens=2), FRAMES)
    chat.show(videos=[str(clips / "shapes.mp4")])
    first = "".join(chat.ask("what is it?"))
    with pytest.raises(DataError, match="text.mp4: the video cannot be read"):
        chat.show([str(pictures[0])], [str(clips / "text.mp4")])
    chat.show([str(pictures[0])], [str(clips / "wide.mp4")])
    second = "".join(chat.ask("and these?"))
    said = ["<video>\nwhat is it?", first, "<video>\n<image>\nand these?", second]
    assert [turn["value"] for turn in chat.messages] == said
    assert [len(video.frames) for video in chat.videos] == [FRAMES, FRAMES] and len(chat.images) == 1
    chat.reset()
    assert chat.messages == [] and chat.videos == []


def test_the_command_takes_videos(composed, clips, monkeypatch, capsys):
    monkeypatch.setattr("moellava.vlm.open_vlm", lambda *_, **__: composed)
    words = [
        "--model-path",
        "x",
        "--video-file",
        str(clips / "shapes.mp4"),
        "--num-frames",
        "3",
        "--max-new-tokens",
        "2",
    ]
    assert cli.main([*words, "--question", "what?"]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(f"what?\n/video {clips / 'short.mkv'}\n/video gone.mp4\nand?\n"))
    capsys.readouterr()
    assert cli.main(words) == 0
    assert "gone.mp4: no such video file" in capsys.readouterr().out
    with pytest.raises(UserError, match="--num-frames 0: a video is at least 1 frame"):
        cli.main([*words, "--num-frames", "0"])
