# SPDX-License-Identifier: Apache-2.0
"""Stand-in for Phi-3-Vision's processor: <|image_1|> becomes as many -1 as the image has tokens; one text at a time."""

import re

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

CROP = 28
CROPS = 4


class Phi3VImageProcessor(BaseImageProcessor):
    model_input_names = ["pixel_values"]

    def __init__(self, num_crops=CROPS, num_img_tokens=4, **kwargs):
        super().__init__(**kwargs)
        self.num_crops = num_crops
        self.num_img_tokens = num_img_tokens

    def __call__(self, images, return_tensors=None):
        sizes = [tuple(min(2, -(-side // CROP)) * CROP for side in reversed(image.size)) for image in images]
        values = [self._crops(image, size) for image, size in zip(images, sizes, strict=True)]
        tokens = [height // CROP * (width // CROP) + 1 for height, width in sizes]
        data = {"pixel_values": torch.stack(values), "image_sizes": torch.tensor(sizes), "num_img_tokens": tokens}
        return BatchFeature(data=data)

    def _crops(self, image, size):
        """[CROPS + 1, 3, CROP, CROP]: the whole, its parts, and zeros."""
        whole, parts = self._array(image, (CROP, CROP)), self._array(image, size)
        tiles = [whole]
        for top in range(0, size[0], CROP):
            tiles += [parts[:, top : top + CROP, left : left + CROP] for left in range(0, size[1], CROP)]
        padding = [torch.zeros_like(whole)] * (self.num_crops + 1 - len(tiles))
        return torch.stack([*tiles, *padding])

    def _array(self, image, size):
        array = np.asarray(image.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR), dtype=np.float32)
        return torch.from_numpy(array.copy()).permute(2, 0, 1) / 255


class Phi3VProcessor(ProcessorMixin):
    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor, tokenizer, **kwargs):
        super().__init__(image_processor, tokenizer)

    def __call__(self, text, images=None, return_tensors=None):
        if not images:
            return self.tokenizer(text, return_tensors=return_tensors)
        shown = self.image_processor(images)
        pattern = r"<\|image_(\d+)\|>"
        chunks = [self.tokenizer(chunk).input_ids for chunk in re.split(r"<\|image_\d+\|>", text)]
        ids = list(chunks[0])
        for number, chunk in zip(map(int, re.findall(pattern, text)), chunks[1:], strict=True):
            ids += [-number] * shown["num_img_tokens"][number - 1] + chunk
        input_ids = torch.tensor([ids])
        data = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        return BatchFeature(data=data | {name: shown[name] for name in ("pixel_values", "image_sizes")})
