"""Collators of the families whose models want more than the processor's own tokens and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moellava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moellava.data.media_reader import MediaReader, Run
from moellava.errors import UserError
from moellava.lmm.collators import MediaCollator


class PrefixCollator(MediaCollator):
    """PaliGemma: all that stands before the first answer is read in both directions, the rest from left to right.

    `token_type_ids` [B, L] say which is which: 0 before the first supervised token of a row and in its padding, 1 from
    there on. For one question and one answer that is what the processor makes of `suffix=`.

    Raises:
        UserError: questions are to be trained on; each of their tokens sees those that it would have to predict.
    """

    def __init__(self, reader: MediaReader, pad_token_id: int, train_questions: bool = False):
        if train_questions:
            raise UserError(
                "--mask_question_tokens False cannot train this family: a question is read in both directions, so that "
                "each of its tokens sees those that it would have to predict."
            )
        super().__init__(reader, pad_token_id)

    def _row(self, sample: dict[str, Any], runs: Sequence[Run], names: Sequence[str]) -> dict[str, list[int]]:
        row = super()._row(sample, runs, names)
        trained = (sample["labels"] != IGNORE_INDEX).nonzero()
        if not len(trained):  # a prompt to be answered
            return row | {"token_type_ids": [0] * len(row["input_ids"])}
        prefix = sample["input_ids"][: int(trained[0])].tolist()
        shown = prefix.count(IMAGE_TOKEN_INDEX)
        length = len(prefix) + sum(len(run.ids) - 1 for run in runs[:shown])
        return row | {"token_type_ids": [0] * length + [1] * (len(row["input_ids"]) - length)}


class CrossAttentionCollator(MediaCollator):
    """Llama 3.2 Vision: an image is one token, and its features are read through cross-attention.

    The model wants images in rows of the batch, also for rows that show none, and `cross_attention_mask`
    [B, L, images, tiles]: 1 where a token reads a tile. A token reads the last image before it; images that follow one
    another without a word between them are read together. A row without images reads nothing, and the model then
    computes for it what it computes without any image.
    """

    PER_IMAGE = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """As of `MediaCollator`, with the model's further inputs."""
        batch = super().__call__(samples)
        del batch["cross_attention_mask"]  # of the placeholders that the processor was asked for, not of these rows
        with_images = [number for number, sample in enumerate(samples) if sample["images"]]
        for name in self.PER_IMAGE:
            shown = batch[name]
            batch[name] = shown.new_zeros(len(samples), *shown.shape[1:])
            batch[name][with_images or [0]] = shown
        tiles = batch["aspect_ratio_mask"].sum(-1)
        batch["aspect_ratio_mask"][..., 0] = 1  # what the image processor says of an image that is not there
        reads = batch["input_ids"].new_zeros(*batch["input_ids"].shape, *batch["aspect_ratio_mask"].shape[1:])
        for number in with_images:
            places = (batch["input_ids"][number] == self.reader.placeholder_id).nonzero().flatten().tolist()
            for image, (begin, end) in enumerate(spans_read(places, reads.shape[1])):
                reads[number, begin:end, image, : int(tiles[number, image])] = 1
        return batch | {"cross_attention_mask": reads}


def spans_read(places: Sequence[int], length: int) -> list[tuple[int, int]]:
    """The tokens (begin, end) that read each image, by the places of the images' tokens in a row of `length` tokens.

    places 0 3, length 8  ->  (0, 3) (3, 8)
    places 0 1, length 8  ->  (0, 8) (1, 8)
    """
    spans: list[tuple[int, int]] = []
    end = length
    for index in reversed(range(len(places))):
        following = places[index + 1] if index + 1 < len(places) else length
        end = end if following == places[index] + 1 else following
        spans.append((places[index], end))
    return spans[::-1]


class PathCollator(MediaCollator):
    """Qwen-VL: images are paths among the ids. Without any, its model runs its tower on a blank image by itself."""

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """As of `MediaCollator`, with no blank image."""
        if any(sample["images"] for sample in samples):
            return super().__call__(samples)
        return self._padded([self._row(sample, [], []) for sample in samples], [])


class NumberedCollator(MediaCollator):
    """Phi-3-Vision: the tokens of a row's first image are -1, those of its second -2, and so on; then a text begins."""

    def _row(self, sample: dict[str, Any], runs: Sequence[Run], names: Sequence[str]) -> dict[str, list[int]]:
        return super()._row(sample, [self._numbered(run, number) for number, run in enumerate(runs, 1)], names)

    def _padded(self, rows: Sequence[dict[str, list[int]]], blanks: Sequence[Run]) -> dict[str, torch.Tensor]:
        return super()._padded(rows, [self._numbered(run, 1) for run in blanks])

    def _numbered(self, run: Run, number: int) -> Run:
        """An image's tokens as its negative number, and what the text behind it begins with."""
        leading = self.reader.processor.leading
        return Run([-number] * (len(run.ids) - len(leading)) + leading, run.extras)


COLLATORS: dict[str, type[MediaCollator]] = {
    "llama-3.2-vision": CrossAttentionCollator,
    "paligemma": PrefixCollator,
    "qwen-vl": PathCollator,
    "phi3-v": NumberedCollator,
}
"""Family -> its collator, where `MediaCollator` does not do."""


def collator_for(
    family_id: str, processor: Any, train_questions: bool = False, reader: MediaReader | None = None
) -> MediaCollator:
    """The collator of a family's model.

    Args:
        family_id: key in `LMM_FAMILIES`.
        processor: the model's own.
        train_questions: train on every token but padding and media.
        reader: of that processor, if there is one already; making one asks the processor for an image.
    """
    collator = COLLATORS.get(family_id, MediaCollator)
    return collator(reader or MediaReader(processor), processor.tokenizer.pad_token_id or 0, train_questions)
