# SPDX-License-Identifier: Apache-2.0
"""Every record of a data set is looked at before training, once: what was found is kept for the next run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from moellava.constants import MODALITIES
from moellava.data.embedded import is_embedded
from moellava.data.encoder import Encoder, Example
from moellava.data.findings import KEY, findings
from moellava.data.fingerprint import fingerprint, versions
from moellava.data.media import MediaFiles
from moellava.data.records import Medium, Records, media_of
from moellava.data.scan import CHUNK, gathered, mapped, share, slices_of, with_progress, workers_for
from moellava.data.shown import SLICE, Shown, scattered, states_of
from moellava.data.verdicts import ROW, Judged, Verdict, joined, packed
from moellava.errors import BadFileError, DataError

SOUND = np.dtype([(KEY, "<u8")])
"""A file with which nothing is wrong."""


class Judge:
    """Finds out what becomes of records.

    Args:
        records, encoder, files, max_length, overlong, bad_files: see `SupervisedDataset`.
    """

    def __init__(
        self,
        records: Records,
        encoder: Encoder,
        files: MediaFiles,
        max_length: int | None,
        overlong: str,
        bad_files: str,
    ):
        self.records = records
        self.encoder = encoder
        self.files = files
        self.max_length = max_length
        self.overlong = overlong
        self.bad_files = bad_files
        self.broken: dict[Medium, str] = {}

    def of_all(self, workers: int = 0) -> Judged:
        """Verdicts about all records, in their order. Collective: processes that train together look at an even share
        each, and tell each other.

        Args:
            workers: see `SupervisedDataset`.
        """
        shown = Shown(self.records)
        states, self.broken, is_broken = self._files(shown)
        decides = np.array([self.encoder.looks_at(Medium(modality, "")) for modality in MODALITIES])
        keys = self.records.said ^ scattered(shown.mixed(np.where(decides[shown.modality], states, np.uint64(0))))
        mine = np.arange(*share(len(self.records)))
        return joined(gathered(self._share(mine, keys, shown.any_of(is_broken), workers)))

    def _share(self, numbers: np.ndarray, keys: np.ndarray, is_broken: np.ndarray, workers: int) -> Judged:
        """Verdicts about some records: those that were found before, and those that are found now."""
        kept = findings("lengths", self._decides, ROW, len(keys))
        counts, rows = kept.known(keys[numbers])
        is_known = (counts > 0) & ~is_broken[numbers]
        known = Judged(np.repeat(numbers, counts), rows, {}).only(np.repeat(is_known, counts))
        new = numbers[~is_known]
        several, what = workers_for(len(new), workers), f"Looking at {len(new)} records"
        judged = joined(mapped(partial(self._of, keys), slices_of(new, CHUNK), several, what, 1))
        firsts = new[np.unique(keys[new], return_index=True)[1]]  # records may be the same
        kept.add(judged.only(np.isin(judged.numbers, firsts)).rows)
        return joined([known, judged])

    def _decides(self) -> list[Any]:
        """What decides over all verdicts."""
        return [fingerprint(self.encoder), self.files.settings, self.max_length, self.overlong, self.bad_files]

    def _files(self, shown: Shown) -> tuple[np.ndarray, dict[Medium, str], np.ndarray]:
        """Of all media: the state of their files (see `states_of`) [M], what is wrong with some, and with which [M].
        Collective."""
        mine = np.arange(*share(len(shown)))
        states, is_broken = np.zeros(len(shown), np.uint64), np.zeros(len(shown), bool)
        broken: dict[Medium, str] = {}
        for numbers, own, problems in gathered(self._looked_at(shown, mine[shown.in_file[mine]])):
            states[numbers] = own
            is_broken[[number for number, _, _ in problems]] = True
            broken |= {medium: problem for _, medium, problem in problems}
        return states, broken, is_broken

    def _looked_at(
        self, shown: Shown, numbers: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, list[tuple[int, Medium, str]]]:
        """Numbers of media, the states of their files, and what is wrong with some. A file that was sound is sound
        while its state is the same."""
        kept = findings("files", lambda: [versions(), self.files.settings], SOUND, len(shown))
        states, is_new = np.zeros(len(numbers), np.uint64), np.zeros(len(numbers), bool)
        problems: list[tuple[int, Medium, str]] = []
        for begin, media in with_progress(
            shown.slices(numbers), -(-len(numbers) // SLICE), "Looking at images and videos"
        ):
            end = begin + len(media)
            states[begin:end] = states_of(media, self.files)
            new = np.flatnonzero(kept.known(states[begin:end])[0] == 0)
            wrong = self.files.problems([media[place] for place in new])
            problems += [(int(numbers[begin + n]), media[n], wrong[media[n]]) for n in new if media[n] in wrong]
            is_new[begin + new] = [media[place] not in wrong for place in new]
        kept.add(np.unique(states[is_new & (states != 0)]).astype(SOUND))
        return numbers, states, problems

    def _of(self, keys: np.ndarray, numbers: np.ndarray) -> Judged:
        """Verdicts about some records."""
        return packed((number, int(keys[number]), self.of(number)) for number in numbers.tolist())

    def of(self, number: int) -> list[Verdict]:
        """What becomes of a record: one verdict, or one for each answer."""
        record, name = self.records[number], self.records.name(number)
        bad = [f"{name}: {problem}" for medium in media_of(record) if (problem := self._problem(medium))]
        return [self._bad(bad)] if bad else self._judged(record, name)

    def _problem(self, medium: Medium) -> str | None:
        """What is wrong with the file of a medium, or with one that its record holds itself."""
        return self.files.problem(medium) if is_embedded(medium.path) else self.broken.get(medium)

    def _bad(self, problems: Sequence[str]) -> Verdict:
        """What becomes of a record whose files are not sound."""
        return Verdict(left_out="bad_files", why=problems[0]) if self.bad_files == "skip" else Verdict(problems)

    def _judged(self, record: dict[str, Any], name: str) -> list[Verdict]:
        """What becomes of a record whose files are sound."""
        problem = self.encoder.renderer.problem(record)
        if problem:
            return [Verdict([f"{name} {problem}"])]
        limit = self.max_length if self.overlong == "truncate" else None
        try:
            examples = self.encoder.examples(record, name, self.files, max_length=limit)
        except DataError as error:
            problems = [text if name in text else f"{name}: {text}" for text in error.problems]
            return [self._bad(problems) if isinstance(error, BadFileError) else Verdict(problems)]
        if not examples:
            return [Verdict([nothing_to_train(record, name)])]
        return [self._measured(record, name, answer, example) for answer, example in examples]

    def _measured(self, record: dict[str, Any], name: str, answer: int | None, example: Example) -> Verdict:
        """What becomes of a sample, by its length."""
        too_long = self.max_length is not None and example.length > self.max_length
        if too_long and self.overlong == "error":
            which = "" if answer is None else f", up to its answer {answer},"
            limit = f"--model_max_length is {self.max_length} (see --overlong)"
            return Verdict([f"{name}{which} takes {example.length} positions but {limit}"])
        if not example.is_trained and not (example.cut or too_long):
            return Verdict([nothing_to_train(record, name)])
        if too_long or not example.is_trained:
            return Verdict(left_out="dropped", answer=answer)
        shown = frozenset("image" if self.encoder.in_frames else medium.modality for medium in example.media)
        return Verdict(length=example.length, modalities=shown, cut=bool(example.cut), answer=answer)


def nothing_to_train(record: dict[str, Any], name: str) -> str:
    """The message for a record that would train nothing."""
    return f'{name} has no answer to train on: "{record["conversations"][0]["value"][:80]}"'


def counted_media(records: Records) -> str:
    """How many images and videos records show, in words; '' where they show none."""
    counts = np.bincount(Shown(records).modality, minlength=len(MODALITIES))
    return " and ".join(f"{n} {name}s" for n, name in zip(counts, MODALITIES, strict=True)) if counts.any() else ""
