"""Every record, image and video of a data set, all problems in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moellava.constants import IMAGE_TOKEN_INDEX
from moellava.data.dataset import problem_with_template
from moellava.data.media import MediaFiles, with_frames
from moellava.data.preprocess import encode_conversation
from moellava.data.records import KINDS, Problem, Records, media_of, read_records
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
