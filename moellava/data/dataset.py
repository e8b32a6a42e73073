# SPDX-License-Identifier: Apache-2.0
"""Records -> samples. What can be wrong with the data is found when the data set is made, before training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from moellava.constants import IGNORE_INDEX
from moellava.data.collate import UNREADABLE
from moellava.data.encoder import Encoder, Example
from moellava.data.judge import Judge, counted_media
from moellava.data.known import KnownMedia
from moellava.data.media import MediaFiles
from moellava.data.packing import Batches
from moellava.data.preprocess import as_tensor
from moellava.data.records import MODALITIES, Medium, Records, media_of
from moellava.data.remote import RemoteFolder
from moellava.data.sampler import FILLER
from moellava.data.verdicts import CUT, DROPPED, SHOWS, WHOLE
from moellava.data.video import Video
from moellava.errors import BadFileError, DataError
from moellava.log import get_logger

OVERLONG = ("error", "drop", "truncate")
BAD_FILES = ("error", "skip")
COUNTS = ("records", "skip_listed", "bad_files", "dropped", "truncated", "split", "samples")
"""What is counted; `split`, the records whose answers are samples each, only where there are any."""


class SupervisedDataset(Batches, Dataset):
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
        workers: least number of processes that look at the records, beside each other; more where that is worth it.
            Processes that train together share the records. See `Judge`.

    Attributes:
        lengths: positions that each sample takes in the model.
        shows_media: whether each sample has an image or a video.
        positions, with_media: both as arrays [N], int32 and bool.
        modalities: what the samples show, all together.
        known: reads media whose features are known (`--cache_features`); None: files are opened.
        cut: whether each sample was too long and has lost its end [N].
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
        self.known: KnownMedia | None = None
        self.unreadable: dict[int, str] = {}
        self._counts = dict.fromkeys(COUNTS, 0) | {"records": len(records), "skip_listed": records.skipped}
        self._judge(Judge(records, encoder, self.files, max_length, overlong, bad_files), takes_media, workers)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample: `input_ids` and `labels` LongTensors [L], -200 once per image or frame and -201 once per video,
        `media`, what they show in their order (images, videos, or the paths of images), and `record`, its name.

        One whose file cannot be read is a `blank_sample`, if bad files are skipped; so is `FILLER`, without a name.

        Raises:
            BadFileError: a file has become unreadable.
        """
        if index == FILLER:
            return blank_sample(self.encoder, "", {})
        number, answer = int(self._kept[index]), int(self._answers[index])
        record, name = self.records[number], self.records.name(number)
        limit = self.max_length if self.overlong == "truncate" else None
        try:
            example = self.encoder.encode(
                record, name, self.files, max_length=limit, answer=None if answer == WHOLE else answer
            )
            media = self.known.read(example.media) if self.known else opened(example.media, self.encoder, self.files)
        except BadFileError as error:
            why = f"{name}: {error}"
            if self.bad_files == "skip":
                return blank_sample(self.encoder, name, {index: why})
            raise BadFileError(f"{why} (`moellava check-data` lists all such files)") from error
        return sample_of(example, media, name)

    def fetch_ahead(self, indices: Iterable[int]) -> None:
        """Fetches images of samples that lie elsewhere, for whoever asks for the samples next."""
        if self.known is None and (self.records.lie_elsewhere or isinstance(self.files.image_folder, RemoteFolder)):
            numbers = [int(self._kept[index]) for index in indices if index != FILLER]
            self.files.fetch_ahead(medium for number in numbers for medium in media_of(self.records[number]))

    def record_of(self, index: int) -> tuple[dict[str, Any], str, int | None]:
        """The record of a sample, its name, and the number of the answer that it trains; None: all of them."""
        number, answer = self._kept[index], self._answers[index]
        return self.records[number], self.records.name(number), None if answer == WHOLE else answer

    @property
    def numbers(self) -> np.ndarray:
        """The number of each sample's record [N]."""
        return self._kept

    @property
    def lengths(self) -> list[int]:
        return self.positions.tolist()

    @property
    def shows_media(self) -> list[bool]:
        return self.with_media.tolist()

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

    def _nothing_left(self) -> str:
        """The message where no record is left to train on: what became of them, by the flags that decided."""
        decided = {
            "skip_listed": "are in --skip_list",
            "bad_files": "have bad files (--bad_files skip)",
            "dropped": f"have nothing to train on within --model_max_length {self.max_length}, or are longer where "
            "--overlong drop is given",
        }
        told = [f"{self._counts[name]} {what}" for name, what in decided.items() if self._counts[name]]
        count = self._counts["records"] + self._counts["skip_listed"]
        return f"no sample remains of {count} records: {'; '.join(told)}"

    def _judge(self, judge: Judge, takes_media: bool, workers: int) -> None:
        """Has every record looked at, and keeps the numbers and lengths of those that are trained on."""
        if not takes_media and (named := counted_media(self.records)):
            raise DataError(f"{named} are named in the data, but --is_multimodal False refuses media")
        judged = judge.of_all(workers)
        flags, answers = judged.rows["flags"], judged.rows["answer"]
        kept = flags & DROPPED == 0
        self._kept, self._answers = judged.numbers[kept].astype(np.int32), answers[kept]
        self.positions, shown = judged.rows["length"][kept], flags[kept]
        self.cut = shown & CUT != 0
        self.with_media = (shown & sum(SHOWS)) != 0
        self._seen = {name for name, flag in zip(MODALITIES, SHOWS, strict=True) if (shown & flag).any()}
        self._counts["dropped"] = int((~kept).sum())
        self._counts["truncated"] = int((flags & CUT != 0).sum())
        self._counts["split"] = len(np.unique(judged.numbers[answers != WHOLE]))
        self._counts["samples"] = len(self._kept)
        said = [verdict for verdicts in judged.told.values() for verdict in verdicts]
        for verdict in said:
            if verdict.left_out:
                self._counts[verdict.left_out] += 1
            if verdict.why:
                get_logger().warning("skipped: %s", verdict.why)
        problems = [problem for verdict in said for problem in verdict.problems]
        if not problems and not len(self._kept):
            problems.append(self._nothing_left())
        if problems:
            raise DataError(problems)


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
    those of a question, unless it has no name: then it stands for no record at all.

    `unreadable` travels to the trainer in the sample and its batch: the number of the sample -> why. See
    `SupervisedDataset.leave_out`.
    """
    example = Example([encoder.tokenizer.eos_token_id], [IGNORE_INDEX])
    return sample_of(example, [], name) | {UNREADABLE: unreadable}
