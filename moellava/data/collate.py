# SPDX-License-Identifier: Apache-2.0
"""Samples -> batches. Here and nowhere else does a placeholder become the model's own tokens.

input_ids of a sample     1  7 -200 8            (one -200 per image, one -201 per video)
in the batch (a run of 3) 1  7  I I I  8 pad     I = the model's image token
labels                    …  … -100 -100 -100 …

of two samples that share a row (`data/packing.py`), each begins at position 0, and so does the padding behind them:
transformers' masks keep apart what `position_ids` tell apart, where no attention mask is given
position_ids              0  1  2 3 4 5  0  1  2 3

One collator for every processor that `MediaReader` can ask; an architecture whose model wants something unusual has a
subclass.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from moellava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX
from moellava.data.media_reader import MediaReader, Run, Shown, blank, modality_of
from moellava.data.places import PLACES, places_of

UNREADABLE = "unreadable"
"""Key of a sample that stands for a record which cannot be shown, and of a batch with such samples."""

RECORDS = "records"
"""Key of a batch of training, and of a sample that is several: the names of its records, without what only fills it
up."""


BEGINS = "begins"
"""Key of a sample that is several, one behind the other: where in its ids each of them begins."""


class MediaCollator:
    """Pads samples of `SupervisedDataset` and puts the tokens of images and videos in place of placeholders.

    Args:
        reader: of the model's processor.
        pad_token_id: fills `input_ids` where `attention_mask` is 0.
        train_questions: train on every token but padding and media (`--mask_question_tokens False`).

    Attributes:
        modalities: what every batch shows, if need be a blank one, so that vision encoder and projector run equally
            often in every step on every rank; ranks that wait for each other's parameters (ZeRO-3) would not meet
            otherwise. A batch that shows nothing shows a blank image all the same.
        for_prompts: whether batches are prompts to be answered: padded on the left, and nothing blank in them.
        is_told: whether a batch says whose it is, under `RECORDS`, and where what stands, under `PLACES`; these are no
            inputs of the model.
    """

    modalities: Sequence[str] = ()
    for_prompts = False
    is_told = False

    def __init__(self, reader: MediaReader, pad_token_id: int, train_questions: bool = False):
        self.reader = reader
        self.pad_token_id = pad_token_id
        self.train_questions = train_questions

    def of_prompts(self) -> MediaCollator:
        """A copy for prompts to be answered."""
        other = copy.copy(self)
        other.for_prompts = True
        return other

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch: `input_ids`, `attention_mask`, `labels` [B, L], and what the processor makes of images and videos
        (`pixel_values` …).

        Where records could not be shown, `UNREADABLE` says which, and why: that is no input of the model, and nothing
        of them is trained on.

        Rows are padded on the right, and blank images and videos stand in that padding: nothing attends to their tokens
        and no label is there. Prompts have no `labels`.

        Raises:
            ValueError: a sample's placeholders and its media differ in number; its record is named.
        """
        shown = [apart(sample, shown_of(sample)) for sample in samples]
        blanks = [] if self.for_prompts else self._blanks([media for parts in shown for media in parts])
        read = [media for media in [*chain.from_iterable(shown), blanks] if media]
        names = ", ".join(sample["record"] for sample in samples if sample["media"])
        media = self.reader.read(read, names or "a blank image") if read else None
        extras = list(media.runs[0][0].extras) if media else []
        runs = iter(media.runs if media else [])
        rows = [
            self._row(sample, [run for part in parts if part for run in next(runs)], extras)
            for sample, parts in zip(samples, shown, strict=True)
        ]
        batch = self._padded(rows, next(runs, []))
        if self.for_prompts:
            del batch["labels"]
        unreadable = {number: why for sample in samples for number, why in sample.get(UNREADABLE, {}).items()}
        beside: dict[str, Any] = {UNREADABLE: unreadable} if unreadable else {}
        if self.is_told and not self.for_prompts:
            named = [name for sample in samples for name in sample.get(RECORDS, [sample["record"]])]
            beside[RECORDS] = [name for name in named if name]
            seen_BL = batch["attention_mask"] * torch.tensor([bool(sample["record"]) for sample in samples])[:, None]
            places = places_of(batch["labels"], seen_BL, batch.get("position_ids"))
            beside[PLACES] = places._asdict()  # the Trainer moves tensors within a dict to its device
        return batch | (media.tensors if media else {}) | beside

    def _blanks(self, shown: Sequence[Sequence[Shown]]) -> list[Shown]:
        """What a batch has to show beside what its samples show."""
        seen = {modality_of(one) for row in shown for one in row}
        missing = [] if self.reader.is_one_input else [blank(name) for name in self.modalities if name not in seen]
        return missing or ([] if seen else [blank("image")])

    def _row(self, sample: dict[str, Any], runs: Sequence[Run], names: Sequence[str]) -> dict[str, list[int]]:
        """A sample's tokens, labels, and further numbers, with every placeholder replaced by its run."""
        row: dict[str, list[int]] = {name: [] for name in ("input_ids", "labels", *names)}
        remaining, begins, starts = iter(runs), set(sample.get(BEGINS, ())), []
        trains_all = self.train_questions and bool((sample["labels"] != IGNORE_INDEX).any())  # no blank sample
        pairs = zip(sample["input_ids"].tolist(), sample["labels"].tolist(), strict=True)
        for number, (token, label) in enumerate(pairs):
            if number in begins:
                starts.append(len(row["input_ids"]))
                label = IGNORE_INDEX  # what would predict it is another sample
            if token in PLACEHOLDERS:
                run = next(remaining)
                row["input_ids"] += run.ids
                row["labels"] += [IGNORE_INDEX] * len(run.ids)
                for name in names:
                    row[name] += run.extras[name]
                continue
            row["input_ids"].append(token)
            row["labels"].append(token if trains_all and number not in begins else label)
            for name in names:
                row[name].append(0)
        ends = [*starts[1:], len(row["input_ids"])]
        positions = [place for start, end in zip(starts, ends, strict=False) for place in range(end - start)]
        return row | ({"position_ids": positions} if BEGINS in sample else {})

    def _padded(self, rows: Sequence[dict[str, list[int]]], blanks: Sequence[Run]) -> dict[str, torch.Tensor]:
        """Tensors [B, L] of all rows, with the runs of what is blank behind the shortest of them."""
        lengths = [len(row["input_ids"]) for row in rows]
        shortest = min(range(len(rows)), key=lengths.__getitem__)
        width = max(max(lengths), lengths[shortest] + sum(len(run.ids) for run in blanks))
        filler = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}
        batch = {name: torch.full((len(rows), width), filler.get(name, 0)) for name in rows[0]}
        batch["attention_mask"] = torch.zeros(len(rows), width, dtype=torch.long)
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            place = slice(width - length, width) if self.for_prompts else slice(0, length)
            batch["attention_mask"][number, place] = 1
            for name, values in row.items():
                batch[name][number, place] = torch.tensor(values)
            if "position_ids" in row:
                batch["position_ids"][number, length:] = torch.arange(width - length)
        end = width
        for run in reversed(blanks):
            begin = end - len(run.ids)
            for name, values in {"input_ids": run.ids, **run.extras}.items():
                batch[name][shortest, begin:end] = torch.tensor(values)
            end = begin
        return batch


def apart(sample: dict[str, Any], media: list[Any]) -> list[list[Any]]:
    """The media of each of the samples that a row holds; a processor may ask how many images a sample shows."""
    begins = sample.get(BEGINS, [0])
    parts = [sample["input_ids"][begin:end] for begin, end in zip(begins, [*begins[1:], None], strict=True)]
    rest = iter(media)
    return [[next(rest) for token in part.tolist() if token in PLACEHOLDERS] for part in parts]


PLACEHOLDERS = {IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX}


def shown_of(sample: dict[str, Any]) -> list[Any]:
    """The images and videos of a sample, in the order of their placeholders. Raises ValueError: see `MediaCollator`."""
    placeholders = sum(token in PLACEHOLDERS for token in sample["input_ids"].tolist())
    if placeholders != len(sample["media"]):
        raise ValueError(f"{sample['record']} has {placeholders} placeholders but {len(sample['media'])} media")
    return sample["media"]
