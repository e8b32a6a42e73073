# SPDX-License-Identifier: Apache-2.0
"""Every record, image and video of a data set, all problems in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from moellava.constants import MODALITIES, ROLES
from moellava.data.encoder import Encoder
from moellava.data.media import MediaFiles
from moellava.data.records import Problem, Records, media_of, read_records
from moellava.data.skip_lists import SkipList
from moellava.errors import DataError


@dataclass
class CheckReport:
    """What a check found.

    Attributes:
        counts: files, records, records with images, with videos and with neither, images and videos named, their
            files, turns.
        problems: in the order of the files.
        lengths: positions of each sample in the model, if there was an encoder; none where a broken file decides them.
            A record is a sample, or each of its answers is (see `Encoder.examples`).
        notices: what was read and means nothing.
    """

    counts: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def check(
    paths: Sequence[str],
    files: MediaFiles,
    encoder: Encoder | None = None,
    max_length: int | None = None,
    skip: SkipList | None = None,
    roles: tuple[str, str] = ROLES,
) -> CheckReport:
    """Reads every record, decodes every image and video in full and, with an encoder, masks every conversation.

    Args:
        paths: data files.
        files: where images and videos lie, and how many frames of a video are wanted.
        encoder: also find conversations that are too long or have nothing to train on.
        max_length: positions that a record may take.
        skip: records to leave out.
        roles: what the files call the human and the model, beside the usual names.
    """
    records, problems = read_records(paths, skip, roles)
    report = CheckReport(_counts(paths, records, problems), problems, notices=records.notices)
    broken = files.problems(chain.from_iterable(map(media_of, records)), in_full=True)
    split = 0
    for index in range(len(records)):
        record, name, key = records[index], records.name(index), records.key(index)
        bad = [medium for medium in media_of(record) if medium in broken]
        texts = [f"{name}: {broken[medium]}" for medium in bad]
        if encoder is not None and not any(map(encoder.looks_at, bad)):
            lengths, found = _measure(encoder, record, name, files, max_length)
            texts += found
            report.lengths += lengths
            split += len(lengths) > 1
        report.problems += [Problem(key, text) for text in texts]
    if split:
        report.counts["split"] = split
        report.notices.append(
            f"the chat template rewrites earlier turns: each answer of {split} records is a sample of its own, with "
            "the history that it has when it is given"
        )
    return report


def _counts(paths: Sequence[str], records: Records, problems: list[Problem]) -> dict[str, int]:
    shown = [media_of(record) for record in records]
    shown_as = [[medium.modality for medium in media] for media in shown]
    files = {medium for media in shown for medium in media}
    return {
        "files": len(paths),
        "records": len(records) + sum(problem.key is not None for problem in problems),
        "skip_listed": records.skipped,
        **{f"with_{modality}": sum(modality in found for found in shown_as) for modality in MODALITIES},
        "text_only": sum(not media for media in shown),
        **{f"{modality}s_named": sum(found.count(modality) for found in shown_as) for modality in MODALITIES},
        **{f"{modality}_files": sum(medium.modality == modality for medium in files) for modality in MODALITIES},
        "turns": sum(len(record["conversations"]) for record in records),
    }


def _measure(
    encoder: Encoder, record: dict, name: str, files: MediaFiles, max_length: int | None
) -> tuple[list[int], list[str]]:
    """Positions that the samples of a record take, and what is wrong with them."""
    problem = encoder.renderer.problem(record)
    if problem:
        return [0], [f"{name} {problem}"]
    try:
        examples = [example for _, example in encoder.examples(record, name, files)]
    except DataError as error:
        return [0], ["; ".join(text if name in text else f"{name}: {text}" for text in error.problems)]
    lengths = [example.length for example in examples]
    if not any(example.is_trained for example in examples):
        return lengths, [f"{name} has no answer to train on"]
    longest = max(lengths)
    if max_length is not None and longest > max_length:
        return lengths, [f"{name} takes {longest} positions, more than {max_length}"]
    return lengths, []
