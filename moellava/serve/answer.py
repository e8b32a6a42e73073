# SPDX-License-Identifier: Apache-2.0
"""Answers of any vision-language model: to many requests at once, or one as it grows. No deepspeed, no trainer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from torch import Tensor

from moellava.data.collate import MediaCollator
from moellava.data.dataset import opened, sample_of
from moellava.data.encoder import Example
from moellava.data.media import MediaFiles
from moellava.data.records import Medium
from moellava.data.video import Video
from moellava.errors import UserError
from moellava.log import get_logger
from moellava.serve.ending import Ending
from moellava.serve.generate import Sampling, generate
from moellava.serve.generate import stream as stream_row
from moellava.serve.prompt import Request
from moellava.vlm import VLM

logger = get_logger(__name__)

Result = TypeVar("Result")

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
        self.ending = Ending(self.vlm.tokenizer, self.vlm.encoder.renderer.terminator, self.vlm.model.generation_config)

    def example(self, request: Request) -> Example:
        """A request as its model reads it. Raises UserError for what is none, or leaves no room for an answer."""
        if not isinstance(request, Request):
            raise UserError(f"{request!r:.80} is a {type(request).__name__}, not a Request(question, images=[…])")
        example = self.vlm.encoder.encode(request.record, NAME, self.files, opens=True)
        if example.length >= self.vlm.context_length:
            raise UserError(
                f"The prompt has {example.length} tokens, images included, but the model reads at most "
                f"{self.vlm.context_length}: {request.messages[-1]['value'][:80]!r}"
            )
        return example

    def opened(self, example: Example) -> list[Any]:
        """What a prompt shows. Raises BadFileError for a file that cannot be read."""
        return opened(example.media, self.vlm.encoder, self.files)

    def batch(self, examples: Sequence[Example], shown: Sequence[list[Any]] | None = None) -> dict[str, Tensor]:
        """What the model takes of some prompts, padded on the left. What they show is opened, unless it is given."""
        shown = [self.opened(example) for example in examples] if shown is None else shown
        return self.collator([sample_of(example, media, NAME) for example, media in zip(examples, shown, strict=True)])

    def options(self, examples: Sequence[Example]) -> dict[str, Any]:
        """What `generate` is told of a batch; an answer may grow until the model's context is full."""
        return {
            "placeholders": self.vlm.placeholder_ids,
            "pad_token_id": self.collator.pad_token_id,
            "limits": [self.vlm.context_length - example.length for example in examples],
            "features": self.vlm.features,
        }


class Answer(str):
    """What a model says: a text, which is empty where the request could not be answered.

    Attributes:
        error: why it could not; None where it was.
    """

    error: UserError | None = None

    @classmethod
    def refused(cls, error: UserError) -> Answer:
        """That of a request that cannot be answered."""
        answer = cls()
        answer.error = error
        return answer


def answer(
    vlm: VLM, requests: Sequence[Request], sampling: Sampling | None = None, *, batch_size: int = 8, **options: Any
) -> list[Answer]:
    """Answers of a model, in the order of the requests.

    A request that cannot be answered, because its prompt exceeds the model's context or an image cannot be read, has an
    empty answer with an `error`, which is logged; the others are answered. An answer does not depend on what else is in
    its batch (to rounding, and while no capacity factor drops tokens). Requests of similar length share a batch, the
    longest first: what does not fit into memory shows at once.

    Args:
        vlm: of `open_vlm`.
        requests: questions or conversations, with or without images and videos.
        sampling: how tokens are chosen; None: the likeliest, or as `options` say.
        batch_size: requests that run together.
        options: fields of `Sampling` by name, instead of it.

    Raises:
        UserError: an option means nothing, or the model cannot be asked here.
    """
    if isinstance(requests, Request | str | Mapping) or not isinstance(requests, Sequence):
        raise UserError(f"requests is a {type(requests).__name__}: give a list of them.")
    if unknown := sorted(options.keys() - {option.name for option in fields(Sampling)}):
        raise UserError(f"{', '.join(unknown)}: no option of Sampling, nor of answer.")
    if sampling is not None and options:
        raise UserError(f"{', '.join(options)}: given beside sampling, which says how tokens are chosen.")
    sampling = sampling or Sampling(**options)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size is {batch_size!r}: at least 1 request runs at a time.")
    prompts = Prompts(vlm)
    answers: dict[int, Answer] = {}
    examples = dict(_answerable(range(len(requests)), lambda index: prompts.example(requests[index]), answers))
    order = sorted(examples, key=lambda index: examples[index].length, reverse=True)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        shown = dict(_answerable(chosen, lambda index: prompts.opened(examples[index]), answers))
        if not shown:
            continue
        rows = [examples[index] for index in shown]
        batch = prompts.batch(rows, list(shown.values()))
        said = generate(vlm.model, batch, prompts.ending, sampling, **prompts.options(rows))
        answers |= {index: Answer(prompts.ending.text(tokens)) for index, tokens in zip(shown, said, strict=True)}
    return [answers[index] for index in range(len(requests))]


def _answerable(
    numbers: Iterable[int], made: Callable[[int], Result], answers: dict[int, Answer]
) -> Iterator[tuple[int, Result]]:
    """(number, what is made of the request), for requests of which it can be; the others are answered by its error."""
    for number in numbers:
        try:
            yield number, made(number)
        except UserError as error:
            logger.warning("Request %d is not answered: %s", number, error)
            answers[number] = Answer.refused(error)


def stream(vlm: VLM, request: Request, sampling: Sampling | None = None) -> Iterator[str]:
    """One answer in pieces, as they are certain; their join is what `answer` gives. Arguments: see `answer`."""
    prompts = Prompts(vlm)
    rows = [prompts.example(request)]
    batch, options = prompts.batch(rows), prompts.options(rows)
    yield from stream_row(vlm.model, batch, prompts.ending, sampling or Sampling(), **options)
