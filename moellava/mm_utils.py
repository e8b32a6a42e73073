# SPDX-License-Identifier: Apache-2.0
"""LLaVA's helpers under LLaVA's names and signatures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from moellava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from moellava.data.images import normalised

ASPECT_RATIOS = ("square", "pad")


def tokenizer_image_token(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> list[int] | torch.Tensor:
    """Token ids of a prompt, `image_token_index` once for each `<image>` in it.

    Args:
        prompt: text; special tokens spelled in it are special tokens, so pass prompts of templates, not raw messages.
        tokenizer: each stretch between two images is tokenized by it as a text of its own, BOS kept once.
        image_token_index: the placeholder.
        return_tensors: None for a list, 'pt' for a LongTensor [L].

    Raises:
        ValueError: another `return_tensors`.
    """
    stretches = [tokenizer(stretch).input_ids for stretch in prompt.split(DEFAULT_IMAGE_TOKEN)]
    bos = tokenizer.bos_token_id
    leads = 1 if bos is not None and stretches[0][:1] == [bos] else 0
    ids = list(stretches[0])
    for stretch in stretches[1:]:
        ids += [image_token_index, *stretch[leads:]]
    if return_tensors is None:
        return ids
    if return_tensors == "pt":
        return torch.tensor(ids, dtype=torch.long)
    raise ValueError(f"return_tensors is {return_tensors!r} but must be None or 'pt'")


def expand2square(image: Image.Image, background_color: int | tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square of its longer side, the rest filled with `background_color`."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), background_color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def process_images(images: Sequence[Image.Image], image_processor: Any, model_cfg: Any) -> torch.Tensor:
    """Pixel values [n, 3, H, W] of images.

    Args:
        images: of any size and mode.
        image_processor: a Hugging Face image processor.
        model_cfg: its `image_aspect_ratio` is read; 'pad' or anything else. See `pixel_values`.
    """
    aspect_ratio = "pad" if getattr(model_cfg, "image_aspect_ratio", None) == "pad" else "square"
    return pixel_values(images, image_processor, aspect_ratio)


def pixel_values(images: Sequence[Image.Image], image_processor: Any, aspect_ratio: str) -> torch.Tensor:
    """What the vision tower takes, [n, 3, H, W].

    Args:
        images: of any size and mode, at least one.
        image_processor: a Hugging Face image processor.
        aspect_ratio: 'pad' fills an image to a square with the processor's mean colour first, so that nothing of it is
            cropped away; 'square' leaves it to the processor.

    Raises:
        ValueError: another aspect ratio.
        BadFileError: see `normalised`.
    """
    if aspect_ratio not in ASPECT_RATIOS:
        raise ValueError(f"image_aspect_ratio is {aspect_ratio!r} but must be one of {', '.join(ASPECT_RATIOS)}")
    coloured = [normalised(image) for image in images]
    if aspect_ratio == "pad":
        coloured = [expand2square(image, background_of(image_processor)) for image in coloured]
    return image_processor(coloured, return_tensors="pt")["pixel_values"]


def background_of(image_processor: Any) -> tuple[int, ...]:
    """The processor's mean colour, 0-255: what padding is filled with, and about zero after normalisation."""
    return tuple(int(channel * 255) for channel in image_processor.image_mean)
