"""Samples -> batches of released models: one collator for every processor that `MediaReader` can ask.

A family whose model wants something unusual has a subclass in `family_collators.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moellava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX
from moellava.lmm.media import MediaReader, Run

MEDIA_OF = {IMAGE_TOKEN_INDEX: "images", VIDEO_TOKEN_INDEX: "videos"}
"""Placeholder -> what of a sample stands behind it."""


class MediaCollator:
    """Pads samples of `MediaDataset` on the right and puts the tokens of images and videos in place of placeholders.

    Args:
        reader: of the model's processor.
        pad_token_id: fills `input_ids` where `attention_mask` is 0.
        train_questions: train on every token but padding and media (`--mask_question_tokens False`).
    """

    def __init__(self, reader: MediaReader, pad_token_id: int, train_questions: bool = False):
        self.reader = reader
        self.pad_token_id = pad_token_id
        self.train_questions = train_questions

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch: `input_ids`, `attention_mask`, `labels` [B, L], and what the processor makes of images and videos.

        A batch without any carries a blank image, so that vision encoder and projector take part in every step on every
        rank. Its tokens stand in the right padding of a row: nothing attends to them and no label is there.

        Raises:
            ValueError: a sample's placeholders and its images or videos differ in number; its record is named.
        """
        shown = [shown_of(sample) for sample in samples]
        if any(shown):
            names = ", ".join(sample["record"] for sample, row in zip(samples, shown, strict=True) if row)
            media = self.reader.read([row for row in shown if row], names)
        else:
            media = self.reader.blank()
        extras = list(media.runs[0][0].extras)
        runs = iter(media.runs)
        rows = [
            self._row(sample, next(runs) if row else [], extras) for sample, row in zip(samples, shown, strict=True)
        ]
        shortest = min(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
        hidden = None if any(shown) else (shortest, media.runs[0][0])
        return {**self._padded(rows, hidden), **media.tensors}

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

    def _padded(self, rows: Sequence[dict[str, list[int]]], hidden: tuple[int, Run] | None) -> dict[str, torch.Tensor]:
        """Tensors [B, L] of all rows, with the run of a blank image behind one of them if there is one."""
        lengths = [len(row["input_ids"]) for row in rows]
        width = max(lengths)
        if hidden:
            width = max(width, lengths[hidden[0]] + len(hidden[1].ids))
        filler = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}
        batch = {name: torch.full((len(rows), width), filler.get(name, 0)) for name in rows[0]}
        batch["attention_mask"] = torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            batch["attention_mask"][number, : lengths[number]] = 1
            for name, values in row.items():
                batch[name][number, : lengths[number]] = torch.tensor(values)
        if hidden:
            number, run = hidden
            where = slice(width - len(run.ids), width)
            for name, values in {"input_ids": run.ids, **run.extras}.items():
                batch[name][number, where] = torch.tensor(values)
        return batch


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
