"""Answers of any vision-language model: to many requests at once, or one as it grows. No deepspeed, no trainer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from moellava.data.collate import MediaCollator
from moellava.data.dataset import opened, sample_of
from moellava.data.encoder import Example
from moellava.data.media import MediaFiles
from moellava.data.records import Medium
from moellava.data.video import Video
from moellava.errors import UserError
from moellava.serve.ending import Ending
from moellava.serve.generate import Sampling, generate
from moellava.serve.generate import stream as stream_row
from moellava.serve.prompt import Request
from moellava.vlm import VLM

CACHE_BYTES = 2**28
"""Images that one call of `answer` keeps open: 795 of 336 × 336, 21,845 of 64 × 64."""

CHANNELS = 3

NAME = "the request"


class OpenImages(MediaFiles):
    """Files whose images stay open for the next question about them; the ones not used for longest go first.

    Args:
        limit: bytes kept.
    """

    def __init__(self, limit: int = CACHE_BYTES):
        super().__init__()
        self.limit = limit
        self.bytes = 0
        self.kept: OrderedDict[str, Image.Image] = OrderedDict()

    def read(self, medium: Medium) -> Image.Image | Video:
        """See `MediaFiles.read`."""
        if medium.modality != "image" or not isinstance(medium.path, str | Path):
            return super().read(medium)
        key = str(medium.path)
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        image: Any = super().read(medium)
        self.kept[key] = image
        self.bytes += _bytes_of(image)
        while self.bytes > self.limit and len(self.kept) > 1:
            self.bytes -= _bytes_of(self.kept.popitem(last=False)[1])
        return image


def _bytes_of(image: Image.Image) -> int:
    return image.width * image.height * CHANNELS


@dataclass
class Prompts:
    """What turns requests into batches for one model. Raises UserError for a model that cannot be asked here.

    Args:
        vlm: the model.
        files: opens what requests show.
    """

    vlm: VLM
    files: MediaFiles = field(default_factory=OpenImages)

    def __post_init__(self) -> None:
        self.vlm.require_answers()
        self.collator: MediaCollator = self.vlm.collator().of_prompts()
        self.ending = Ending(self.vlm.tokenizer, self.vlm.encoder.renderer.terminator)

    def example(self, request: Request) -> Example:
        """A request as its model reads it. Raises UserError where no room is left for an answer."""
        example = self.vlm.encoder.encode(request.record, NAME, self.files, opens=True)
        if example.length >= self.vlm.context_length:
            raise UserError(
                f"The prompt has {example.length} tokens, images included, but the model reads at most "
                f"{self.vlm.context_length}: {request.messages[-1]['value'][:80]!r}"
            )
        return example

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """What the model takes of some prompts, padded on the left."""
        shown = [opened(example.media, self.vlm.encoder, self.files) for example in examples]
        return self.collator([sample_of(example, media, NAME) for example, media in zip(examples, shown, strict=True)])

    def options(self, examples: Sequence[Example]) -> dict[str, Any]:
        """What `generate` is told of a batch; an answer may grow until the model's context is full."""
        return {
            "placeholders": self.vlm.placeholder_ids,
            "pad_token_id": self.collator.pad_token_id,
            "limits": [self.vlm.context_length - example.length for example in examples],
        }


def answer(
    vlm: VLM, requests: Sequence[Request], sampling: Sampling | None = None, *, batch_size: int = 8, **options: Any
) -> list[str]:
    """Answers of a model, in the order of the requests.

    A request's answer does not depend on what else is in its batch (to rounding, and while no capacity factor drops
    tokens). Requests of similar length share a batch, the longest first: what does not fit into memory shows at once.

    Args:
        vlm: of `open_vlm`.
        requests: questions or conversations, with or without images and videos.
        sampling: how tokens are chosen; None: the likeliest, or as `options` say.
        batch_size: requests that run together.
        options: fields of `Sampling` by name, instead of it.

    Raises:
        UserError: a prompt exceeds the model's context, an image cannot be read, or an option means nothing.
    """
    sampling = sampling or Sampling(**options)
    prompts = Prompts(vlm)
    examples = [prompts.example(request) for request in requests]
    order = sorted(range(len(requests)), key=lambda index: examples[index].length, reverse=True)
    texts = [""] * len(requests)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [examples[index] for index in chosen]
        said = generate(vlm.model, prompts.batch(rows), prompts.ending, sampling, **prompts.options(rows))
        for index, tokens in zip(chosen, said, strict=True):
            texts[index] = prompts.ending.text(tokens)
    return texts


def stream(vlm: VLM, request: Request, sampling: Sampling | None = None) -> Iterator[str]:
    """One answer in pieces, as they are certain; their join is what `answer` gives. Arguments: see `answer`."""
    prompts = Prompts(vlm)
    rows = [prompts.example(request)]
    batch, options = prompts.batch(rows), prompts.options(rows)
    yield from stream_row(vlm.model, batch, prompts.ending, sampling or Sampling(), **options)
