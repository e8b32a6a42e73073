"""Records -> samples. What can be wrong with the data is found when the data set is made, before training."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from moellava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, IMAGE_TOKEN_INDEX
from moellava.data.masking import Encoded
from moellava.data.media import NUM_FRAMES, MediaFiles, frame_counts, with_frames
from moellava.data.preprocess import as_tensor, encode_conversation, is_plain
from moellava.data.records import KINDS, Medium, Records, media_of, paths_of
from moellava.data.scan import mapped, shared
from moellava.errors import DataError
from moellava.log import get_logger
from moellava.mm_utils import pixel_values

OVERLONG = ("error", "drop", "truncate")
BAD_FILES = ("error", "skip")
COUNTS = ("records", "skip_listed", "bad_files", "dropped", "truncated", "samples")


class Finding(NamedTuple):
    """What became of a record.

    Attributes:
        problems: why it cannot be trained on; any is an error.
        left_out: the count of `COUNTS` that it goes into, if it is left out without being an error.
        why: what is said about that.
        length: positions that it takes in the model.
        shows: whether it has an image or a video.
        cut: whether its end was cut.
    """

    problems: Sequence[str] = ()
    left_out: str | None = None
    why: str | None = None
    length: int = 0
    shows: bool = False
    cut: bool = False


class SupervisedDataset(Dataset):
    """Samples of a model with a vision tower, from validated records.

    Args:
        records: of `load_records`.
        tokenizer: of `load_tokenizer`.
        version: a name of `conv_templates`.
        image_processor: a Hugging Face image processor; needed if a record has an image or a video.
        image_folder, video_folder, num_frames: as of `MediaFiles`; a video is its frames, an image each.
        tokens_per_image: positions that one image takes in the model's sequence.
        aspect_ratio: 'square' or 'pad', as of `pixel_values`.
        max_length: the longest sample, in positions: text tokens and expanded images. None: no limit.
        overlong: what happens to a longer one: 'error', 'drop' (counted), or 'truncate': its end is cut, before an
            image or video that does not fit whole (counted; dropped if nothing to train on is left).
        use_im_start_end: put `<im_start>` and `<im_end>` around each image.
        bad_files: 'error', or 'skip': leave out (and count) records with a file that is missing, cut short or no image
            or video, or a video with too few frames.
        workers: processes that look at the records, beside each other; 0: this one does. Processes that train together
            share the records (`shared`).

    Raises:
        DataError: with one line for every problem of every record.
    """

    def __init__(
        self,
        records: Records,
        tokenizer: PreTrainedTokenizerBase,
        *,
        version: str,
        tokens_per_image: int,
        image_processor: Any = None,
        image_folder: str | Path | None = None,
        video_folder: str | Path | None = None,
        num_frames: int = NUM_FRAMES,
        aspect_ratio: str = "square",
        max_length: int | None = None,
        overlong: str = "error",
        use_im_start_end: bool = False,
        bad_files: str = "error",
        workers: int = 0,
    ):
        if overlong not in OVERLONG or bad_files not in BAD_FILES:
            raise ValueError(
                f"overlong must be in {OVERLONG} and bad_files in {BAD_FILES}: {overlong!r}, {bad_files!r}"
            )
        self.records = records
        self.tokenizer = tokenizer
        self.version = version
        self.image_processor = image_processor
        self.files = MediaFiles(image_folder, video_folder, num_frames)
        self.tokens_per_image = tokens_per_image
        self.aspect_ratio = aspect_ratio
        self.max_length = max_length
        self.overlong = overlong
        self.image_ids = image_ids_of(tokenizer, use_im_start_end)
        self._counts = dict.fromkeys(COUNTS, 0) | {"records": len(records), "skip_listed": records.skipped}
        self._kept = array("q")
        self._lengths = array("q")
        self._has_image = array("b")
        self._scan(bad_files, workers)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample: `input_ids` and `labels` LongTensors [L], -200 once per image or frame, `pixel_values`
        [n_images, 3, H, W], and `record`, its name.

        Raises:
            DataError: a file has become unreadable.
        """
        number = self._kept[index]
        record, name = self.records[number], self.records.name(number)
        encoded, _ = self._encode(record, name)
        return {
            "input_ids": as_tensor(encoded.ids),
            "labels": as_tensor(encoded.labels),
            "pixel_values": self._pixels(record, encoded.ids.count(IMAGE_TOKEN_INDEX), name),
            "record": name,
        }

    @property
    def lengths(self) -> list[int]:
        """Positions that each sample takes in the model: text tokens and expanded images."""
        return self._lengths.tolist()

    @property
    def modalities(self) -> list[bool]:
        """Whether each sample has an image or a video."""
        return [bool(flag) for flag in self._has_image]

    def report(self) -> dict[str, int]:
        """Counts of `COUNTS`: records read, left out by the skip list, left out for a bad file, dropped because too
        long or with nothing left to train on, cut; and the samples that remain."""
        return dict(self._counts)

    def _scan(self, bad_files: str, workers: int) -> None:
        """Validates every record and keeps the indices and lengths of those that are trained on."""
        broken = self._broken_files()

        def look(number: int) -> Finding:
            record, name = self.records[number], self.records.name(number)
            bad = [f"{name}: {broken[medium]}" for medium in media_of(record) if medium in broken]
            if not bad:
                return self._measure(record, name)
            return Finding(left_out="bad_files", why=bad[0]) if bad_files == "skip" else Finding(bad)

        found = shared(range(len(self.records)), lambda numbers: mapped(look, numbers, workers))
        for number, finding in enumerate(found):
            self._take(number, finding)
        self._counts["samples"] = len(self._kept)
        problems = [problem for finding in found for problem in finding.problems]
        if not problems and not self._kept:
            problems.append(f"no sample remains: {self._counts}")
        if problems:
            raise DataError(problems)

    def _take(self, number: int, finding: Finding) -> None:
        """Keeps a record, or counts it."""
        self._counts["truncated"] += finding.cut
        if finding.left_out:
            self._counts[finding.left_out] += 1
        elif not finding.problems:
            self._kept.append(number)
            self._lengths.append(finding.length)
            self._has_image.append(finding.shows)
        if finding.why:
            get_logger().warning("skipped: %s", finding.why)

    def _broken_files(self) -> dict[Medium, str]:
        """What is wrong with the files of images and videos that something is wrong with."""
        media = list(dict.fromkeys(chain.from_iterable(map(media_of, self.records))))
        if media and self.image_processor is None:
            counts = " and ".join(f"{sum(medium.kind == kind for medium in media)} {kind}s" for kind in KINDS)
            raise DataError(f"{counts} are named in the data, but there is no image tower to see them")
        problems = shared(media, lambda share: list(map(self.files.problems(share).get, share)))
        return {medium: problem for medium, problem in zip(media, problems, strict=True) if problem}

    def _measure(self, record: dict[str, Any], name: str) -> Finding:
        """What becomes of a record whose files are sound."""
        problem = problem_with_template(record, self.version)
        if problem:
            return Finding([f"{name} {problem}"])
        try:
            encoded, cut = self._encode(record, name)
            length = self._length(encoded.ids, record)
        except DataError as error:
            return Finding([text if name in text else f"{name}: {text}" for text in error.problems])
        too_long = self.max_length is not None and length > self.max_length
        if too_long and self.overlong == "error":
            limit = f"--model_max_length is {self.max_length} (see --overlong)"
            return Finding([f"{name} takes {length} positions but {limit}"])
        if not encoded.is_trained and not (cut or too_long):
            return Finding([f'{name} has no answer to train on: "{record["conversations"][0]["value"][:80]}"'])
        if too_long or not encoded.is_trained:
            return Finding(left_out="dropped")
        return Finding(length=length, shows=self._shows(encoded.ids), cut=cut)

    def _encode(self, record: dict[str, Any], name: str) -> tuple[Encoded, bool]:
        """Ids and labels of a record, and whether they were cut to `max_length`."""
        media = frame_counts(record, self.files.num_frames)
        source = with_frames(record["conversations"], self.files.num_frames)
        encoded = encode_conversation(source, self.tokenizer, self.version, bool(media), self.image_ids, name)
        if (
            self.overlong != "truncate"
            or self.max_length is None
            or self._length(encoded.ids, record) <= self.max_length
        ):
            return encoded, False
        end = cut_length(encoded.ids, self.max_length, self.tokens_per_image, self.image_ids, media)
        return Encoded(encoded.ids[:end], encoded.labels[:end]), True

    def _shows(self, ids: Sequence[int]) -> bool:
        """Whether an image or a video is in a sample."""
        return IMAGE_TOKEN_INDEX in ids

    def _length(self, ids: Sequence[int], record: dict[str, Any]) -> int:
        return len(ids) + ids.count(IMAGE_TOKEN_INDEX) * (self.tokens_per_image - 1)

    def _pixels(self, record: dict[str, Any], shown: int, name: str) -> torch.Tensor:
        """The first `shown` images of a record, frames counted."""
        counts = frame_counts(record, self.files.num_frames)
        last = sum(1 for before in accumulate(counts, initial=0) if before < shown)
        if not shown:
            return torch.empty(0, 3, 0, 0)
        try:
            images = self.files.pictures(media_of(record)[:last])
        except DataError as error:
            raise DataError(f"{name}: {error} (`moellava check-data` lists all such files)") from error
        return pixel_values(images, self.image_processor, self.aspect_ratio)


def image_ids_of(tokenizer: PreTrainedTokenizerBase, use_im_start_end: bool) -> tuple[int, ...]:
    """What one image becomes in `input_ids`: its placeholder, between `<im_start>` and `<im_end>` where asked for.

    Raises:
        ValueError: the tokenizer lacks those two (`place_image_token` adds them).
    """
    if not use_im_start_end:
        return (IMAGE_TOKEN_INDEX,)
    known = tokenizer.added_tokens_encoder
    for text in (DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN):
        if text not in known:
            raise ValueError(f"the tokenizer has no {text}: call place_image_token with it first")
    return known[DEFAULT_IM_START_TOKEN], IMAGE_TOKEN_INDEX, known[DEFAULT_IM_END_TOKEN]


def problem_with_template(record: dict[str, Any], version: str) -> str | None:
    """What a sound record lacks for a template, as the end of a sentence; None if nothing."""
    if not is_plain(version):
        return None
    turns = len(record["conversations"])
    if turns != 2 or not media_of(record):
        counts = " and ".join(f"{len(paths_of(record, kind))} {kind}s" for kind in KINDS)
        return f"has {turns} turns and {counts}, but --version {version} trains on one caption of something shown"
    return None


def cut_length(
    ids: Sequence[int], max_length: int, tokens_per_image: int, image_ids: Sequence[int], media: Sequence[int] = ()
) -> int:
    """How many of the ids fit into `max_length` positions without ending inside an image, its wrapping, or a video.

    Args:
        ids: with `IMAGE_TOKEN_INDEX` once per image, which takes `tokens_per_image` positions.
        max_length: positions.
        image_ids: what one image is in `ids`.
        media: how many images make one image or video, in order (of `frame_counts`); missing ones are 1.
    """
    lead = list(image_ids).index(IMAGE_TOKEN_INDEX)
    remaining = iter(media)
    positions, index = 0, 0
    while index < len(ids):
        end = index + 1
        if index + lead < len(ids) and ids[index + lead] == IMAGE_TOKEN_INDEX:
            end = index + lead
            for _ in range(next(remaining, 1)):
                end = ids.index(IMAGE_TOKEN_INDEX, end) + 1
            end += len(image_ids) - lead - 1
        step = ids[index:end]
        positions += len(step) + step.count(IMAGE_TOKEN_INDEX) * (tokens_per_image - 1)
        if positions > max_length:
            return index
        index = end
    return index
