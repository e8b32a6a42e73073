# SPDX-License-Identifier: Apache-2.0
"""`moellava check-data`: every record, image and video of a data set, all problems in one pass."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from moellava.commands.given import Idle, refuse_idle
from moellava.commands.records import DATA_HELP, add_confine_flag, add_limit_flags, add_role_flags, limits_of, roles_of
from moellava.commands.values import CommandParser, count
from moellava.data.media import NUM_FRAMES, MediaFiles, require_frames
from moellava.data.skip_lists import read_skip_list, write_skip_list
from moellava.files import require_output
from moellava.log import printable
from moellava.startup import importing

if TYPE_CHECKING:
    from moellava.data.check import CheckReport


def _report(found: CheckReport, skip_list: str | None) -> str:
    """The report as text: a line per problem and notice, then the counts."""
    lines = [problem.text for problem in found.problems] + found.notices
    lines.append(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in found.counts.items()))
    if found.lengths:
        ordered = sorted(found.lengths)
        median, longest = ordered[len(ordered) // 2], ordered[-1]
        lines.append(f"positions in the model: {ordered[0]} to {longest}, median {median}")
    lines.append(f"{len(found.problems)} problems" if found.problems else "no problem found")
    if skip_list is not None:
        count = write_skip_list(skip_list, found.problems)
        lines.append(f"{skip_list} lists {count} records to skip (--skip_list in training)")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="moellava check-data", description=__doc__)
    parser.add_argument("data", nargs="+", help=DATA_HELP)
    parser.add_argument("--image-folder", help="what the image paths in the records are relative to")
    parser.add_argument("--video-folder", help="what the video paths are relative to (default: --image-folder)")
    parser.add_argument("--num-frames", type=int, default=NUM_FRAMES, help=f"frames of a video (default: {NUM_FRAMES})")
    add_limit_flags(parser)
    parser.add_argument(
        "--tokenizer", "--model-path", help="folder or hub id of a tokenizer or model; also checks lengths and masks"
    )
    parser.add_argument("--version", help="template, with --tokenizer (default: the model's)")
    parser.add_argument("--max-length", type=count, help="positions that a record may take, with --tokenizer")
    parser.add_argument("--tokens-per-image", type=count, help="positions of an image, without a model (576)")
    parser.add_argument("--skip-list", help="write the keys of all records that have a problem to this file")
    parser.add_argument("--known", help="a skip list whose records are left out of the check")
    parser.add_argument("--quick", action="store_true", help="read heads and endings of files, and decode nothing")
    parser.add_argument("--workers", type=count, help="processes beside each other (default: as many as pay)")
    add_role_flags(parser)
    add_confine_flag(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def idle_flags(args: argparse.Namespace) -> list[Idle]:
    """Flags that the others leave nothing to do."""
    needed = ("version", "max_length", "tokens_per_image")
    return [Idle(needed, not args.tokenizer, "is read with --tokenizer alone: which tokenizer is it for?")]


def main(argv: list[str]) -> int:
    """Prints all problems and counts. Exit status 1 if there is a problem."""
    parser = _parser()
    args = parser.parse_args(argv)
    refuse_idle(parser, argv, idle_flags(args))
    require_frames(args.num_frames, "--num-frames")
    limits = limits_of(args)
    if args.skip_list:
        require_output(args.skip_list, "--skip-list")
    known = read_skip_list(args.known) if args.known else None
    encoder = None
    with importing():
        from moellava.data.check import check
    if args.tokenizer:
        with importing():
            from moellava.vlm import open_encoder
        encoder = open_encoder(
            args.tokenizer, version=args.version, tokens_per_image=args.tokens_per_image, flag="--tokenizer"
        )
    found = check(
        args.data,
        MediaFiles(args.image_folder, args.video_folder, args.num_frames, limits, args.confine_media),
        encoder,
        args.max_length,
        known,
        roles_of(args),
        in_full=not args.quick,
        workers=args.workers,
    )
    if known is not None:
        known.require_used()
    report = _report(found, args.skip_list)
    if args.json:
        problems = [problem._asdict() for problem in found.problems]
        content = {"counts": found.counts, "problems": problems, "notices": found.notices}
        report = json.dumps(content, ensure_ascii=False, indent=1)
    print(printable(report))
    return 1 if found.problems else 0
