"""The collator of a released model, by its architecture."""

from __future__ import annotations

from typing import Any

from moellava.data.media_reader import MediaReader
from moellava.lmm.collators import COLLATORS, MediaCollator

__all__ = ["COLLATORS", "collator_for"]


def collator_for(
    name: str, processor: Any, train_questions: bool = False, reader: MediaReader | None = None
) -> MediaCollator:
    """The collator of an architecture's model.

    Args:
        name: key in `ARCHITECTURES`.
        processor: the model's own.
        train_questions: train on every token but padding and media.
        reader: of that processor, if there is one already; making one asks the processor for an image.
    """
    return COLLATORS[name](reader or MediaReader(processor), processor.tokenizer.pad_token_id or 0, train_questions)
