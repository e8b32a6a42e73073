# SPDX-License-Identifier: Apache-2.0
"""Records -> samples. What can be wrong with the data is found when the data set is made, before training."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from moellava.constants import IGNORE_INDEX
from moellava.data.collate import UNREADABLE
from moellava.data.encoder import Encoder, Example
from moellava.data.media import MediaFiles
from moellava.data.preprocess import as_tensor
from moellava.data.records import MODALITIES, Medium, Records, media_of
from moellava.data.scan import mapped, shared
from moellava.data.video import Video
from moellava.errors import BadFileError, DataError
from moellava.log import get_logger

OVERLONG = ("error", "drop", "truncate")
BAD_FILES = ("error", "skip")
COUNTS = ("records", "skip_listed", "bad_files", "dropped", "truncated", "split", "samples")
"""What is counted; `split`, the records whose answers are samples each, only where there are any."""


class Verdict(NamedTuple):
    """What became of a record, or of one of its answers where each is a sample.

    Attributes:
        problems: why it cannot be trained on; any is an error.
        left_out: the count of `COUNTS` that it goes into, if it is left out without being an error.
        why: what is said about that.
        length: positions that it takes in the model.
        modalities: what it shows.
        cut: whether its end was cut.
        answer: number of the answer; None for the whole record.
    """

    problems: Sequence[str] = ()
    left_out: str | None = None
    why: str | None = None
    length: int = 0
    modalities: frozenset[str] = frozenset()
    cut: bool = False
    answer: int | None = None


WHOLE = -1
"""Stands for a whole record where the number of an answer might stand."""


class SupervisedDataset(Dataset):
    """Samples of a vision-language model, from validated records: a record is one, or each of its answers is, where the
    chat template rewrites earlier turns (see `Encoder.examples`).

    Args:
        records: of `load_records`.
        encoder: of the model.
        files: where images and videos lie.
        max_length: the longest sample, in positions: text tokens and media. None: no limit.
        overlong: what happens to a longer one: 'error', 'drop' (counted), or 'truncate': its end is cut, before an
            image or video that does not fit whole (counted; dropped if nothing to train on is left).
        bad_files: 'error', or 'skip': leave out (and count) records with a file that is missing, damaged, beyond the
            limits or no image or video, or a video with too few frames. A file that proves damaged only when it is
            decoded leaves an empty sample in its record's place (`blank_sample`), so that all processes stay in step.
        takes_media: False refuses records with media.
        workers: processes that look at the records, beside each other; 0: this one does. Processes that train together
            share the records (`shared`).

    Attributes:
        lengths: positions that each sample takes in the model.
        shows_media: whether each sample has an image or a video.
        modalities: what the samples show, all together.
        unreadable: sample -> its file's problem, of files that proved damaged only when they were decoded.

    Raises:
        DataError: with one line for every problem of every record.
        UserError: a template that cannot be masked.
    """

    def __init__(
        self,
        records: Records,
        encoder: Encoder,
        files: MediaFiles | None = None,
        *,
        max_length: int | None = None,
        overlong: str = "error",
        bad_files: str = "error",
        takes_media: bool = True,
        workers: int = 0,
    ):
        if overlong not in OVERLONG or bad_files not in BAD_FILES:
            raise ValueError(
                f"overlong must be in {OVERLONG} and bad_files in {BAD_FILES}: {overlong!r}, {bad_files!r}"
            )
        self.records = records
        self.encoder = encoder
        self.files = files or MediaFiles()
        self.max_length = max_length
        self.overlong = overlong
        self.bad_files = bad_files
        self.unreadable: dict[int, str] = {}
        self._counts = dict.fromkeys(COUNTS, 0) | {"records": len(records), "skip_listed": records.skipped}
        self._kept = array("q")
        self._answers = array("q")
        self._lengths = array("q")
        self._shows_media = array("b")
        self._seen: set[str] = set()
        self._scan(takes_media, workers)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample: `input_ids` and `labels` LongTensors [L], -200 once per image or frame and -201 once per video,
        `media`, what they show in their order (images, videos, or the paths of images), and `record`, its name.

        One whose file cannot be read is a `blank_sample`, if bad files are skipped.

        Raises:
            BadFileError: a file has become unreadable.
        """
        number, answer = self._kept[index], self._answers[index]
        record, name = self.records[number], self.records.name(number)
        limit = self.max_length if self.overlong == "truncate" else None
        try:
            example = self.encoder.encode(
                record, name, self.files, max_length=limit, answer=None if answer == WHOLE else answer
            )
            media = opened(example.media, self.encoder, self.files)
        except BadFileError as error:
            why = f"{name}: {error}"
            if self.bad_files == "skip":
                return blank_sample(self.encoder, name, {index: why})
            raise BadFileError(f"{why} (`moellava check-data` lists all such files)") from error
        return sample_of(example, media, name)

    @property
    def lengths(self) -> list[int]:
        return self._lengths.tolist()

    @property
    def shows_media(self) -> list[bool]:
        return [bool(flag) for flag in self._shows_media]

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(modality for modality in MODALITIES if modality in self._seen)

    def report(self) -> dict[str, int]:
        """Counts of `COUNTS`: records read, left out by the skip list, left out for a bad file; samples dropped because
        too long or with nothing left to train on, cut; records whose answers are samples each; and the samples that
        remain."""
        lost = len({self._kept[index] for index in self.unreadable})
        samples = self._counts["samples"] - len(self.unreadable)
        counts = self._counts | {"bad_files": self._counts["bad_files"] + lost, "samples": samples}
        return {name: count for name, count in counts.items() if count or name != "split"}

    def leave_out(self, unreadable: Mapping[int, str]) -> None:
        """Counts samples, and says why, whose blanks have come up: here, or in another process."""
        for index, why in unreadable.items():
            if index not in self.unreadable:
                get_logger().warning("skipped: %s", why)
                self.unreadable[index] = why

    def _scan(self, takes_media: bool, workers: int) -> None:
        """Validates every record and keeps the indices and lengths of those that are trained on."""
        broken = self._broken_files(takes_media)

        def look(number: int) -> list[Verdict]:
            record, name = self.records[number], self.records.name(number)
            bad = [f"{name}: {broken[medium]}" for medium in media_of(record) if medium in broken]
            return [self._bad(bad)] if bad else self._judge(record, name)

        judged = shared(range(len(self.records)), lambda numbers: mapped(look, numbers, workers))
        for number, verdicts in enumerate(judged):
            self._counts["split"] += any(verdict.answer is not None for verdict in verdicts)
            for verdict in verdicts:
                self._take(number, verdict)
        self._counts["samples"] = len(self._kept)
        problems = [problem for verdicts in judged for verdict in verdicts for problem in verdict.problems]
        if not problems and not self._kept:
            problems.append(f"no sample remains: {self._counts}")
        if problems:
            raise DataError(problems)

    def _take(self, number: int, verdict: Verdict) -> None:
        """Keeps a record, or counts it."""
        self._counts["truncated"] += verdict.cut
        if verdict.left_out:
            self._counts[verdict.left_out] += 1
        elif not verdict.problems:
            self._kept.append(number)
            self._answers.append(WHOLE if verdict.answer is None else verdict.answer)
            self._lengths.append(verdict.length)
            self._shows_media.append(bool(verdict.modalities))
            self._seen |= verdict.modalities
        if verdict.why:
            get_logger().warning("skipped: %s", verdict.why)

    def _broken_files(self, takes_media: bool) -> dict[Medium, str]:
        """What is wrong with the files of images and videos that something is wrong with."""
        media = list(dict.fromkeys(chain.from_iterable(map(media_of, self.records))))
        if media and not takes_media:
            counts = [f"{sum(medium.modality == name for medium in media)} {name}s" for name in MODALITIES]
            raise DataError(f"{' and '.join(counts)} are named in the data, but --is_multimodal False refuses media")
        problems = shared(media, lambda share: list(map(self.files.problems(share).get, share)))
        return {medium: problem for medium, problem in zip(media, problems, strict=True) if problem}

    def _bad(self, problems: Sequence[str]) -> Verdict:
        """What becomes of a record whose files are not sound."""
        return Verdict(left_out="bad_files", why=problems[0]) if self.bad_files == "skip" else Verdict(problems)

    def _judge(self, record: dict[str, Any], name: str) -> list[Verdict]:
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


def opened(media: Sequence[Medium], encoder: Encoder, files: MediaFiles) -> list[Any]:
    """What a model is shown: images, the frames of videos or videos, or the paths of images, once they have been read.
    Raises BadFileError."""
    read = [files.read(medium) for medium in media]
    if not encoder.reader.loads_images:
        return [files.file_of(medium) for medium in media]
    shown: list[Any] = []
    for content in read:
        shown += content.frames if encoder.in_frames and isinstance(content, Video) else [content]
    return shown


def sample_of(example: Example, media: Sequence[Any], name: str) -> dict[str, Any]:
    """A sample as the collator takes it. See `SupervisedDataset.__getitem__`."""
    return {
        "input_ids": as_tensor(example.ids),
        "labels": as_tensor(example.labels),
        "media": list(media),
        "record": name,
    }


def blank_sample(encoder: Encoder, name: str, unreadable: dict[int, str]) -> dict[str, Any]:
    """What stands for a record that cannot be shown: one token, which nothing is trained on, and no image.

    A batch keeps its size by it, and a process its number of batches. The losses of routers see the token, as they see
    those of a question. `unreadable` travels to the trainer in the sample and its batch: the number of the sample ->
    why. See `SupervisedDataset.leave_out`.
    """
    example = Example([encoder.tokenizer.eos_token_id], [IGNORE_INDEX])
    return sample_of(example, [], name) | {UNREADABLE: unreadable}
