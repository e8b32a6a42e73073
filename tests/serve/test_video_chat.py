"""Chat about videos: a composed model sees the frames, in the place of the tag."""

from __future__ import annotations

import io
from functools import partial

import pytest

from moellava.commands import chat as cli
from moellava.data.video import read_video
from moellava.errors import DataError, UserError
from moellava.serve.answer import answer, stream
from moellava.serve.decode import Sampling
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
    assert shown.in_images().messages == spelled.messages and list(shown.in_images().images) == frames
    parts = (composed.model, composed.tokenizer, composed.processor)
    said = answer(*parts, [shown, spelled, Request("hello")], max_new_tokens=8)
    assert said[0] == said[1] == "".join(stream(*parts, shown, sampling=Sampling(max_new_tokens=8)))


def test_tags_are_put_in_front_and_counted(videos, pictures):
    both = Request("what?", [pictures[0]], videos=videos)
    assert both.messages[0]["value"] == "<video>\n<video>\n<image>\nwhat?"
    assert both.in_images().messages[0]["value"] == "<image>" * 3 + "\n" + "<image>" * 3 + "\n<image>\nwhat?"
    assert Request("no video").in_images().messages == [{"from": "human", "value": "no video"}]
    with pytest.raises(UserError, match="The request has 2 videos but 1 <video> tags: 'one <video>'"):
        Request("one <video>", videos=videos)


def test_a_conversation_remembers_videos(composed, clips, pictures):
    parts = (composed.model, composed.tokenizer, composed.processor)
    chat = cli.Chat(partial(stream, *parts, sampling=Sampling(max_new_tokens=2)), FRAMES)
    chat.show(videos=[str(clips / "shapes.mp4")])
    first = "".join(chat.ask("what is it?"))
    with pytest.raises(DataError, match="text.mp4: the video cannot be read"):
        chat.show([str(pictures[0])], [str(clips / "text.mp4")])
    chat.show([str(pictures[0])], [str(clips / "wide.mp4")])
    second = "".join(chat.ask("and these?"))
    said = ["<video>\nwhat is it?", first, "<video>\n<image>\nand these?", second]
    assert [turn["value"] for turn in chat.messages] == said
    assert [len(video.frames) for video in chat.videos] == [FRAMES, FRAMES] and chat.images == [str(pictures[0])]
    chat.reset()
    assert chat.messages == [] and chat.videos == []


def test_the_command_takes_videos(composed, clips, monkeypatch, capsys):
    loaded = (composed.tokenizer, composed.model, composed.processor, 512)
    monkeypatch.setattr(cli, "load_pretrained_model", lambda *_, **__: loaded)
    monkeypatch.setattr(cli, "is_released", lambda path: False)
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
