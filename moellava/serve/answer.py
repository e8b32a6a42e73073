"""Answers of a model: to many requests at once, or one as it grows. No deepspeed, no trainer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moellava.constants import IMAGE_TOKEN_INDEX
from moellava.data.collate import ImageTextCollator
from moellava.data.images import open_image
from moellava.data.preprocess import terminator_of
from moellava.errors import UserError
from moellava.mm_utils import pixel_values
from moellava.model.builder import image_size, tokens_per_image
from moellava.serve.ending import Ending
from moellava.serve.generate import Sampling, generate
from moellava.serve.generate import stream as stream_row
from moellava.serve.prompt import Picture, Request, encode, image_ids_of, version_of

CACHE_BYTES = 2**28
"""Preprocessed images that one call of `answer` keeps: 198 of 336 × 336, 5,461 of 64 × 64."""


class ImageCache:
    """Preprocessed images by path or by object; the ones not used for longest go first.

    Args:
        image_processor: of the model's processor.
        aspect_ratio: square or pad.
        limit: bytes kept.
    """

    def __init__(self, image_processor: Any, aspect_ratio: str, limit: int = CACHE_BYTES):
        self.image_processor = image_processor
        self.aspect_ratio = aspect_ratio
        self.limit = limit
        self.bytes = 0
        self.kept: OrderedDict[Any, tuple[Picture, Tensor]] = OrderedDict()

    def __call__(self, picture: Picture) -> Tensor:
        """Pixels [1, 3, H, W]. Raises DataError if the file cannot be read."""
        key = str(picture) if isinstance(picture, str | Path) else id(picture)
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key][1]
        image = open_image(picture) if isinstance(picture, str | Path) else picture
        pixels = pixel_values([image], self.image_processor, self.aspect_ratio)
        self.kept[key] = (picture, pixels)  # the picture too: while it lives, its id is its own
        self.bytes += pixels.nbytes
        while self.bytes > self.limit and len(self.kept) > 1:
            self.bytes -= self.kept.popitem(last=False)[1][1].nbytes
        return pixels


@dataclass
class Prompts:
    """What turns requests into batches for one model.

    Args:
        version: name of the template.
        collator: places image tokens and pads on the left.
        images: preprocessed images.
        image_ids: what one image becomes in the ids.
        room: longest prompt with its answer, in tokens.
        ending: where an answer ends.
    """

    tokenizer: Any
    version: str
    collator: ImageTextCollator
    images: ImageCache
    image_ids: list[int]
    room: int
    ending: Ending

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any, processor: Any, version: str | None) -> Prompts:
        """Reads from the model's config whatever training has written there."""
        collator = ImageTextCollator(
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            image_token_id=model.config.image_token_id,
            tokens_per_image=tokens_per_image(model),
            image_size=image_size(model),
        )
        saved = getattr(model.config, "moellava", None) or {}
        images = ImageCache(processor.image_processor, saved.get("image_aspect_ratio") or "square")
        room = model.config.get_text_config().max_position_embeddings
        version = version_of(model, version)
        ending = Ending(tokenizer, terminator_of(version, tokenizer))
        return cls(tokenizer, version, collator, images, image_ids_of(model, tokenizer), room, ending)

    def ids(self, request: Request) -> list[int]:
        """Token ids with one placeholder per image. Raises UserError where no room is left for an answer."""
        ids = encode(request, self.tokenizer, self.version, self.image_ids)
        if self.length(ids) >= self.room:
            raise UserError(
                f"The prompt has {self.length(ids)} tokens, images included, but the model reads at most {self.room}: "
                f"{request.messages[-1]['value'][:80]!r}"
            )
        return ids

    def length(self, ids: list[int]) -> int:
        """Tokens of a prompt once each image has its patches."""
        return len(ids) + ids.count(IMAGE_TOKEN_INDEX) * (self.collator.tokens_per_image - 1)

    def batch(self, requests: Sequence[Request], ids: Sequence[list[int]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` [B, L], left-padded, and `pixel_values` of all their images."""
        samples = []
        for request, row in zip(requests, ids, strict=True):
            pixels = [self.images(picture) for picture in request.images]
            samples.append(
                {
                    "input_ids": torch.tensor(row),
                    "pixel_values": torch.cat(pixels) if pixels else torch.empty(0, 3, *self.collator.image_size),
                }
            )
        return self.collator.left_pad(samples)

    def options(self, ids: Sequence[list[int]]) -> dict[str, Any]:
        """What `generate` is told of a batch; an answer may grow until the model's context is full."""
        return {
            "placeholders": [self.collator.image_token_id],
            "pad_token_id": self.collator.pad_token_id,
            "limits": [self.room - self.length(row) for row in ids],
        }


def answer(
    model: nn.Module,
    tokenizer: Any,
    processor: Any,
    requests: Sequence[Request],
    *,
    version: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    batch_size: int = 8,
) -> list[str]:
    """Answers of a model, in the order of the requests.

    A request's answer does not depend on what else is in its batch (to rounding, and while no capacity factor drops
    tokens). Requests of similar length share a batch, the longest first: what does not fit into memory shows at once.

    Args:
        model, tokenizer, processor: as `load_pretrained_model` gives them.
        requests: questions or conversations, with or without images and videos.
        version: conversation template; None takes the saved config's.
        max_new_tokens: longest answer, in tokens.
        temperature, top_p, seed: see `Sampling`; temperature 0 takes the likeliest token.
        batch_size: requests that run together.

    Raises:
        UserError: no template is known, a prompt exceeds the model's context, or an image cannot be read.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    requests = [request.in_images() for request in requests]
    prompts = Prompts.of(model, tokenizer, processor, version)
    ids = [prompts.ids(request) for request in requests]
    order = sorted(range(len(requests)), key=lambda index: prompts.length(ids[index]), reverse=True)
    texts = [""] * len(requests)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [ids[index] for index in chosen]
        batch = prompts.batch([requests[index] for index in chosen], rows)
        said = generate(model, batch, prompts.ending, sampling, **prompts.options(rows))
        for index, tokens in zip(chosen, said, strict=True):
            texts[index] = prompts.ending.text(tokens)
    return texts


def stream(
    model: nn.Module,
    tokenizer: Any,
    processor: Any,
    request: Request,
    *,
    version: str | None = None,
    sampling: Sampling | None = None,
) -> Iterator[str]:
    """One answer in pieces, as they are certain; their join is what `answer` gives. Arguments: see `answer`."""
    prompts = Prompts.of(model, tokenizer, processor, version)
    request = request.in_images()
    rows = [prompts.ids(request)]
    batch = prompts.batch([request], rows)
    yield from stream_row(model, batch, prompts.ending, sampling or Sampling(), **prompts.options(rows))
