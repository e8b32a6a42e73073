# SPDX-License-Identifier: Apache-2.0
"""Every record, image and video of a data set, all problems in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from moellava.constants import MODALITIES, ROLES
from moellava.data.embedded import is_embedded
from moellava.data.encoder import Encoder
from moellava.data.judge import nothing_to_train
from moellava.data.media import MediaFiles
from moellava.data.record_shape import trained_answers
from moellava.data.records import Medium, Problem, Records, media_of, read_records
from moellava.data.scan import mapped, slices_of, workers_for
from moellava.data.shown import Shown
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
    in_full: bool = True,
    workers: int | None = None,
) -> CheckReport:
    """Reads every record, decodes every image and video in full and, with an encoder, masks every conversation.

    Args:
        paths: data files.
        files: where images and videos lie, and how many frames of a video are wanted.
        encoder: also find conversations that are too long, or have nothing to train on under its template.
        max_length: positions that a record may take.
        skip: records to leave out.
        roles: what the files call the human and the model, beside the usual names.
        in_full: False: heads and endings of files are read, as before training, and nothing is decoded.
        workers: processes that look, beside each other; None: as many as pay.
    """
    records, problems = read_records(paths, skip, roles)
    shown = Shown(records)
    report = CheckReport(_counts(paths, records, problems, shown), problems, notices=records.notices)
    checker = _Checker(records, files, encoder, max_length, in_full)
    slices, count = slices_of(np.flatnonzero(shown.in_file), FILES), int(shown.in_file.sum())
    several = workers_for(count) if workers is None else workers
    found = mapped(partial(checker.wrong, shown), slices, several, f"Reading {count} files", 1)
    checker.broken = {medium: problem for wrong in found for medium, problem in wrong.items()}
    several = workers_for(len(records)) if workers is None else workers
    split = 0
    looked_at = mapped(checker.of, range(len(records)), several, f"Looking at {len(records)} records")
    for number, (turns, texts, lengths) in enumerate(looked_at):
        report.counts["turns"] += turns
        report.lengths += lengths
        split += len(lengths) > 1
        report.problems += [Problem(records.key(number), text) for text in texts]
    if split:
        report.counts["split"] = split
        report.notices.append(
            f"the chat template rewrites earlier turns: each answer of {split} records is a sample of its own, with "
            "the history that it has when it is given"
        )
    return report


FILES = 64
"""Files that a worker reads before it passes on what it has found."""


@dataclass
class _Checker:
    """Looks at files and records. See `check`.

    Attributes:
        broken: what is wrong with files.
    """

    records: Records
    files: MediaFiles
    encoder: Encoder | None
    max_length: int | None
    in_full: bool
    broken: dict[Medium, str] = field(default_factory=dict)

    def wrong(self, shown: Shown, numbers: np.ndarray) -> dict[Medium, str]:
        """What is wrong with some files."""
        return self.files.problems([medium for _, media in shown.slices(numbers) for medium in media], self.in_full)

    def of(self, number: int) -> tuple[int, list[str], list[int]]:
        """Turns of a record, what is wrong with it, and positions of its samples."""
        record, name = self.records[number], self.records.name(number)
        media = dict.fromkeys(media_of(record))
        bad = {medium: problem for medium in media if (problem := self._problem(medium))}
        texts, lengths = [f"{name}: {problem}" for problem in bad.values()], list[int]()
        if self.encoder is not None and not any(map(self.encoder.looks_at, bad)):
            lengths, found = _measure(self.encoder, record, name, self.files, self.max_length)
            texts += found
        elif self.encoder is None and not any(trained_answers(record["conversations"])):
            texts.append(nothing_to_train(record, name))
        return len(record["conversations"]), texts, lengths

    def _problem(self, medium: Medium) -> str | None:
        """What is wrong with a file, or with what a record holds itself."""
        return self.files.problem(medium, self.in_full) if is_embedded(medium.path) else self.broken.get(medium)


def _counts(paths: Sequence[str], records: Records, problems: list[Problem], shown: Shown) -> dict[str, int]:
    of_each = {name: shown.modality == place for place, name in enumerate(MODALITIES)}
    return {
        "files": len(paths),
        "records": len(records) + sum(problem.key is not None for problem in problems),
        "skip_listed": records.skipped,
        **{f"with_{name}": int(shown.any_of(which).sum()) for name, which in of_each.items()},
        "text_only": int((shown.counts == 0).sum()),
        **{f"{name}s_named": int(which[shown.which].sum()) for name, which in of_each.items()},
        **{f"{name}_files": int(which.sum()) for name, which in of_each.items()},
        "turns": 0,
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
        return lengths, [nothing_to_train(record, name)]
    longest = max(lengths)
    if max_length is not None and longest > max_length:
        return lengths, [f"{name} takes {longest} positions, more than {max_length}"]
    return lengths, []
