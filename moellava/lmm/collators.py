"""Samples -> batches of released models: one collator for every processor that `MediaReader` can ask.

An architecture whose model wants something unusual has a subclass in its file of `architectures/`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moellava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX
from moellava.data.media_reader import MediaReader, Run, Shown, blank, kind_of
from moellava.lmm.architecture import FieldView

MEDIA_OF = {IMAGE_TOKEN_INDEX: "images", VIDEO_TOKEN_INDEX: "videos"}
"""Placeholder -> what of a sample stands behind it."""


class MediaCollator:
    """Pads samples of `MediaDataset` on the right and puts the tokens of images and videos in place of placeholders.

    Args:
        reader: of the model's processor.
        pad_token_id: fills `input_ids` where `attention_mask` is 0.
        train_questions: train on every token but padding and media (`--mask_question_tokens False`).

    Attributes:
        kinds: what every batch shows, if need be a blank one, so that vision encoder and projector run equally often in
            every step on every rank; ranks that wait for each other's parameters (ZeRO-3) would not meet otherwise.
            A batch that shows nothing shows a blank image all the same.
    """

    kinds: Sequence[str] = ()

    def __init__(self, reader: MediaReader, pad_token_id: int, train_questions: bool = False):
        self.reader = reader
        self.pad_token_id = pad_token_id
        self.train_questions = train_questions

    def for_prompts(self) -> MediaCollator:
        """A copy for prompts to be answered: nothing blank stands beside what they show."""
        other = copy.copy(self)
        other.kinds = ()
        return other

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch: `input_ids`, `attention_mask`, `labels` [B, L], and what the processor makes of images and videos.

        Blank ones stand in the right padding of a row: nothing attends to their tokens and no label is there.

        Raises:
            ValueError: a sample's placeholders and its images or videos differ in number; its record is named.
        """
        shown = [shown_of(sample) for sample in samples]
        blanks = self._blanks(shown)
        names = ", ".join(sample["record"] for sample, row in zip(samples, shown, strict=True) if row)
        media = self.reader.read([row for row in [*shown, blanks] if row], names or "a blank image")
        extras = list(media.runs[0][0].extras)
        runs = iter(media.runs)
        rows = [
            self._row(sample, next(runs) if row else [], extras) for sample, row in zip(samples, shown, strict=True)
        ]
        return {**self._padded(rows, next(runs, [])), **media.tensors}

    def _blanks(self, shown: Sequence[Sequence[Shown]]) -> list[Shown]:
        """What a batch has to show beside what its samples show."""
        seen = {kind_of(one) for row in shown for one in row}
        missing = [] if self.reader.is_one_input else [blank(kind) for kind in self.kinds if kind not in seen]
        return missing or ([] if seen else [blank("image")])

    def _row(self, sample: dict[str, Any], runs: Sequence[Run], names: Sequence[str]) -> dict[str, list[int]]:
        """A sample's tokens, labels, and further numbers, with every placeholder replaced by its run."""
        row: dict[str, list[int]] = {name: [] for name in ("input_ids", "labels", *names)}
        remaining = iter(runs)
        for token, label in zip(sample["input_ids"].tolist(), sample["labels"].tolist(), strict=True):
            if token in MEDIA_OF:
                run = next(remaining)
                row["input_ids"] += run.ids
                row["labels"] += [IGNORE_INDEX] * len(run.ids)
                for name in names:
                    row[name] += run.extras[name]
                continue
            row["input_ids"].append(token)
            row["labels"].append(token if self.train_questions else label)
            for name in names:
                row[name].append(0)
        return row

    def _padded(self, rows: Sequence[dict[str, list[int]]], blanks: Sequence[Run]) -> dict[str, torch.Tensor]:
        """Tensors [B, L] of all rows, with the runs of what is blank behind the shortest of them."""
        lengths = [len(row["input_ids"]) for row in rows]
        shortest = min(range(len(rows)), key=lengths.__getitem__)
        width = max(max(lengths), lengths[shortest] + sum(len(run.ids) for run in blanks))
        filler = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}
        batch = {name: torch.full((len(rows), width), filler.get(name, 0)) for name in rows[0]}
        batch["attention_mask"] = torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            batch["attention_mask"][number, : lengths[number]] = 1
            for name, values in row.items():
                batch[name][number, : lengths[number]] = torch.tensor(values)
        end = width
        for run in reversed(blanks):
            begin = end - len(run.ids)
            for name, values in {"input_ids": run.ids, **run.extras}.items():
                batch[name][shortest, begin:end] = torch.tensor(values)
            end = begin
        return batch


COLLATORS = FieldView("collator", default=MediaCollator)
"""Architecture -> its collator."""


def shown_of(sample: dict[str, Any]) -> list[Any]:
    """The images and videos of a sample, in the order of their placeholders. Raises ValueError as the collator does."""
    ids = sample["input_ids"].tolist()
    for index, name in MEDIA_OF.items():
        if ids.count(index) != len(sample.get(name, ())):
            raise ValueError(
                f"{sample['record']} has {ids.count(index)} placeholders but {len(sample.get(name, ()))} {name}"
            )
    left = {index: iter(sample.get(name, ())) for index, name in MEDIA_OF.items()}
    return [next(left[token]) for token in ids if token in left]


def generation_inputs(
    prompt: dict[str, Any], collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]], device: Any, dtype: Any
) -> dict[str, Tensor]:
    """What `generate` takes: the batch of one prompt, without the blank image that a batch of text alone carries.

    Args:
        prompt: a sample, of a composed model too, that ends before an answer.
        collator: of the samples.
        device, dtype: of the model.
    """
    collator = collator.for_prompts() if isinstance(collator, MediaCollator) else collator
    batch = collator([prompt])
    del batch["labels"]
    if not any(int((prompt["input_ids"] == placeholder).sum()) for placeholder in MEDIA_OF):
        length = int(batch["attention_mask"].sum())
        batch = {name: batch[name][:, :length] for name in ("input_ids", "attention_mask")}
    return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in batch.items()}
