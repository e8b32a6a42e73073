# SPDX-License-Identifier: Apache-2.0
"""`moellava chat`: one question, or a conversation, about images and videos.

moellava chat --model-path DIR --image-file cat.png --question "What is this?"
moellava chat --model-path DIR --image-file a.png b.png
moellava chat --model-path DIR --video-file clip.mp4 --num-frames 8
python -m moellava.serve.cli --model-path DIR --image-file cat.png
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moellava.commands.given import Idle, refuse_idle
from moellava.commands.records import MEDIA_LIMITS, add_limit_flags, limits_of
from moellava.commands.values import CommandParser
from moellava.data.images import USUAL_LIMITS, Limits
from moellava.data.media import NUM_FRAMES, MediaFiles, require_frames
from moellava.data.records import Medium
from moellava.data.remote import is_remote
from moellava.data.video import Video
from moellava.errors import BadFileError, UserError
from moellava.log import printable
from moellava.startup import importing

if TYPE_CHECKING:
    from moellava.serve.generate import Sampling
    from moellava.serve.prompt import Picture
    from moellava.vlm import VLM

HELP = """Ask about what is shown. Further commands:
  /image FILE …   add images to the next question
  /video FILE …   add videos to the next question
  /reset          forget the conversation and what was shown
  /quit           leave (also Ctrl-D)"""


STOPPED = "\n(stopped; the question is forgotten)"


def make_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = CommandParser(prog="moellava chat", description="Talk to a model about images and videos.")
    parser.add_argument("--model-path", required=True, help="folder of a stage, or a published checkpoint")
    parser.add_argument("--model-base", help="the language model that a published projector or adapter belongs to")
    parser.add_argument("--image-file", nargs="+", default=[], metavar="IMG", help="images of the first question")
    parser.add_argument("--video-file", nargs="+", default=[], metavar="CLIP", help="videos of the first question")
    parser.add_argument("--num-frames", type=int, default=NUM_FRAMES, help=f"frames of a video ({NUM_FRAMES})")
    parser.add_argument("--question", help="ask this, print the answer and leave; without it, a conversation")
    parser.add_argument("--version", help="conversation template, in place of the one that the folder names")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer, in tokens (512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="share of probability that is sampled from (1)")
    parser.add_argument("--top-k", type=int, default=0, help="how many tokens are sampled from (0: all)")
    parser.add_argument("--num-beams", type=int, default=1, help="answers followed at once, the likeliest is given (1)")
    parser.add_argument(
        "--repetition-penalty", type=float, help="above 1 against repetition (as the model's folder says)"
    )
    parser.add_argument("--seed", type=int, help="of the sampling")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps … (the best there is)")
    add_limit_flags(parser)
    return parser


def idle_flags(args: argparse.Namespace) -> list[Idle]:
    """Flags that the others leave nothing to do. A conversation may show files at any time."""
    asks_once = args.question is not None
    return [
        Idle(["seed"], args.temperature == 0, "nothing is drawn at --temperature 0"),
        Idle(["num_frames"], asks_once and not args.video_file, "is about videos: give --video-file"),
        Idle(MEDIA_LIMITS, asks_once and not (args.video_file or args.image_file), "is about images and videos"),
    ]


class Chat:
    """A conversation with a model: what was said, and the images and videos shown.

    Args:
        vlm: the model.
        sampling: how it chooses tokens.
        num_frames: frames that stand for a video.
        limits: how large an image or a frame may be.
    """

    def __init__(self, vlm: VLM, sampling: Sampling, num_frames: int = NUM_FRAMES, limits: Limits = USUAL_LIMITS):
        self.vlm = vlm
        self.sampling = sampling
        self.files = MediaFiles(num_frames=num_frames, limits=limits)
        self.reset()

    def reset(self) -> None:
        """Forgets everything said and shown."""
        self.messages: list[dict[str, str]] = []
        self.images: list[Picture] = []
        self.videos: list[str | Path | Video] = []
        self.leave_out()

    def leave_out(self) -> None:
        """Forgets what was shown since the last answer."""
        self.pending: list[Picture] = []
        self.pending_videos: list[str | Path | Video] = []

    def show(self, images: Sequence[str] = (), videos: Sequence[str] = ()) -> None:
        """Adds files to the next question. Raises BadFileError for one that cannot be read; nothing is added then."""
        for path in (*images, *videos):
            if is_remote(path):
                raise BadFileError(f"{path}: files of a question are not downloaded. Save it, and name the file.")
        opened: dict[str, list[Any]] = {
            modality: [self.files.read(Medium(modality, os.path.expanduser(path))) for path in paths]
            for modality, paths in (("image", images), ("video", videos))
        }
        self.pending += opened["image"]
        self.pending_videos += opened["video"]

    def ask(self, question: str) -> Iterator[str]:
        """The answer, in pieces as they come. A question that fails, or is left before its answer is complete, leaves
        the conversation as it was, and what was shown for it is forgotten."""
        from moellava.serve.answer import Request, stream

        images, videos = self.pending, self.pending_videos
        self.leave_out()
        request = Request(
            messages=[*self.messages, *Request(question, images, videos=videos).messages],
            images=[*self.images, *images],
            videos=[*self.videos, *videos],
        )
        pieces = []
        for piece in stream(self.vlm, request, self.sampling):
            pieces.append(piece)
            yield piece
        self.messages = [*request.messages, {"from": "gpt", "value": "".join(pieces)}]
        self.images, self.videos = list(request.images), list(request.videos)


def say(pieces: Iterator[str], if_empty: str = "") -> None:
    """Prints an answer while it grows, or `if_empty` where the model ends its turn at once."""
    said = False
    for piece in pieces:
        said = True
        print(printable(piece), end="", flush=True)
    print("" if said else if_empty, flush=True)


def converse(chat: Chat) -> None:
    """Reads questions until the input ends. A mistake is a message, and the conversation goes on."""
    print(HELP)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, rest = (line.split(maxsplit=1) + ["", ""])[:2]
        if command == "/quit":
            return
        try:
            if command == "/reset":
                chat.reset()
            elif command == "/image":
                chat.show(paths_in(rest))
            elif command == "/video":
                chat.show(videos=paths_in(rest))
            elif command.startswith("/"):
                print(HELP)
            elif line:
                say(chat.ask(line), if_empty="(the model says nothing)")
        except UserError as error:
            print(printable(error))
        except KeyboardInterrupt:
            print(STOPPED)


def paths_in(line: str) -> list[str]:
    """The files that a line names: quoted as in a shell, or one alone as it is. Raises UserError where none is."""
    if os.path.isfile(os.path.expanduser(line)):
        return [line]
    try:
        paths = shlex.split(line)
    except ValueError as error:  # a quote that stays open
        raise UserError(f"{line}: {error}. Put a name that holds quotes or spaces into the other quotes.") from error
    if not paths:
        raise UserError("No file is named: /image FILE … or /video FILE …")
    return paths


def main(argv: list[str]) -> int:
    """Entry point of the command."""
    parser = make_parser()
    args = parser.parse_args(argv)
    require_frames(args.num_frames, "--num-frames")
    limits = limits_of(args)
    with importing():
        from transformers.utils.logging import disable_progress_bar, set_verbosity_error

        from moellava.model.devices import device_named
        from moellava.serve.generate import Sampling
        from moellava.vlm import open_vlm
    device = device_named(args.device) if args.device is not None else None
    sampling = Sampling(**{field.name: getattr(args, field.name) for field in fields(Sampling)})
    refuse_idle(parser, argv, idle_flags(args))
    disable_progress_bar()  # an answer is not preceded by a bar about the weights,
    set_verbosity_error()  # nor by remarks on the config
    vlm = open_vlm(args.model_path, base=args.model_base, device=device, version=args.version)
    chat = Chat(vlm, sampling, args.num_frames, limits)
    chat.show(args.image_file, args.video_file)
    if args.question is not None:
        say(chat.ask(args.question))
    else:
        converse(chat)
    return 0
