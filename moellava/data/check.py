"""`moellava check-data`: every record, image and video of a data set, all problems in one pass."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moellava.constants import IMAGE_TOKEN_INDEX
from moellava.data.dataset import problem_with_template
from moellava.data.media import NUM_FRAMES, MediaFiles, require_frames, with_frames
from moellava.data.preprocess import encode_conversation
from moellava.data.records import KINDS, Problem, Records, media_of, read_records, read_skip_list
from moellava.data.tokenizers import load_tokenizer
from moellava.errors import DataError, UserError


@dataclass
class Findings:
    """What a check found.

    Attributes:
        counts: files, records, records with images, with videos and with neither, images and videos named, their
            files, turns.
        problems: in the order of the files.
        lengths: positions of each sound record in the model, if a tokenizer was given.
    """

    counts: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


def check(
    paths: Sequence[str],
    media_files: MediaFiles,
    tokenizer: PreTrainedTokenizerBase | None = None,
    version: str | None = None,
    tokens_per_image: int = 1,
    max_length: int | None = None,
    skip: frozenset[str] = frozenset(),
) -> Findings:
    """Reads every record, decodes every image and video in full and, with a tokenizer, masks every conversation.

    Args:
        paths: data files.
        media_files: where images and videos lie, and how many frames of a video are wanted.
        tokenizer: also find conversations that are too long or have nothing to train on.
        version: the template; needed with a tokenizer.
        tokens_per_image: positions that an image takes in the model.
        max_length: positions that a record may take.
        skip: keys of records to leave out.

    Raises:
        UserError: a tokenizer without a version, or a version that does not exist.
    """
    if tokenizer is not None and version is None:
        raise UserError("--tokenizer needs --version as well, to know the template")
    records, problems = read_records(paths, skip)
    findings = Findings(_counts(paths, records, problems), problems)
    broken = media_files.problems(chain.from_iterable(map(media_of, records)), in_full=True)
    for index in range(len(records)):
        record, name, key = records[index], records.name(index), records.key(index)
        texts = [f"{name}: {broken[medium]}" for medium in media_of(record) if medium in broken]
        if tokenizer is not None and version is not None:
            frames = media_files.num_frames
            length, problem = _measure(record, name, tokenizer, version, frames, tokens_per_image, max_length)
            texts += [problem] if problem else []
            findings.lengths.append(length)
        findings.problems += [Problem(key, text) for text in texts]
    return findings


def _counts(paths: Sequence[str], records: Records, problems: list[Problem]) -> dict[str, int]:
    shown = [media_of(record) for record in records]
    kinds = [[medium.kind for medium in media] for media in shown]
    files = {medium for media in shown for medium in media}
    return {
        "files": len(paths),
        "records": len(records) + sum(problem.key is not None for problem in problems),
        "skip_listed": records.skipped,
        **{f"with_{kind}": sum(kind in found for found in kinds) for kind in KINDS},
        "text_only": sum(not media for media in shown),
        **{f"{kind}s_named": sum(found.count(kind) for found in kinds) for kind in KINDS},
        **{f"{kind}_files": sum(medium.kind == kind for medium in files) for kind in KINDS},
        "turns": sum(len(record["conversations"]) for record in records),
    }


def _measure(
    record: dict[str, Any],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    version: str,
    num_frames: int,
    tokens_per_image: int,
    max_length: int | None,
) -> tuple[int, str | None]:
    """Positions that a record takes, and what is wrong with it as a sample."""
    problem = problem_with_template(record, version)
    if problem:
        return 0, f"{name} {problem}"
    try:
        source = with_frames(record["conversations"], num_frames)
        encoded = encode_conversation(source, tokenizer, version, bool(media_of(record)), name=name)
    except DataError as error:
        return 0, str(error)
    length = len(encoded.ids) + encoded.ids.count(IMAGE_TOKEN_INDEX) * (tokens_per_image - 1)
    if not encoded.is_trained:
        return length, f"{name} has no answer to train on"
    if max_length is not None and length > max_length:
        return length, f"{name} takes {length} positions, more than {max_length}"
    return length, None


def write_skip_list(path: str | Path, problems: Sequence[Problem]) -> int:
    """Writes one line `key TAB message` per record that has a problem. Returns how many records these are."""
    first = {problem.key: problem.text for problem in reversed(problems) if problem.key is not None}
    lines = [f"{key}\t{' '.join(text.split())}\n" for key, text in reversed(first.items())]
    Path(path).write_text("".join(lines), encoding="utf-8")
    return len(lines)


def _report(findings: Findings, skip_list: str | None) -> str:
    """The report as text: a line per problem, then the counts."""
    lines = [problem.text for problem in findings.problems]
    lines.append(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in findings.counts.items()))
    if findings.lengths:
        ordered = sorted(findings.lengths)
        median, longest = ordered[len(ordered) // 2], ordered[-1]
        lines.append(f"positions in the model: {ordered[0]} to {longest}, median {median}")
    lines.append(f"{len(findings.problems)} problems" if findings.problems else "no problem found")
    if skip_list is not None:
        count = write_skip_list(skip_list, findings.problems)
        lines.append(f"{skip_list} lists {count} records to skip (--skip_list in training)")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moellava check-data", description=__doc__)
    parser.add_argument("data", nargs="+", help="JSON or JSON Lines files")
    parser.add_argument("--image-folder", help="what the image paths in the records are relative to")
    parser.add_argument("--video-folder", help="what the video paths are relative to (default: --image-folder)")
    parser.add_argument("--num-frames", type=int, default=NUM_FRAMES, help=f"frames of a video (default: {NUM_FRAMES})")
    parser.add_argument("--tokenizer", help="folder or hub id; also checks lengths and masks")
    parser.add_argument("--version", help="template, with --tokenizer")
    parser.add_argument("--max-length", type=int, help="positions that a record may take, with --tokenizer")
    parser.add_argument("--tokens-per-image", type=int, default=576, help="positions of an image (default: 576)")
    parser.add_argument("--skip-list", help="write the keys of all records that have a problem to this file")
    parser.add_argument("--known", help="a skip list whose records are left out of the check")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def main(argv: list[str]) -> int:
    """Prints all problems and counts. Exit status 1 if there is a problem."""
    args = _parser().parse_args(argv)
    require_frames(args.num_frames, "--num-frames")
    findings = check(
        args.data,
        MediaFiles(args.image_folder, args.video_folder, args.num_frames),
        load_tokenizer(args.tokenizer, args.version) if args.tokenizer else None,
        args.version,
        args.tokens_per_image,
        args.max_length,
        read_skip_list(args.known) if args.known else frozenset(),
    )
    report = _report(findings, args.skip_list)
    if args.json:
        problems = [problem._asdict() for problem in findings.problems]
        report = json.dumps({"counts": findings.counts, "problems": problems}, ensure_ascii=False, indent=1)
    print(report)
    return 1 if findings.problems else 0
