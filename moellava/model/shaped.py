# SPDX-License-Identifier: Apache-2.0
"""Images in their own shape: a tower that reads `image_sizes` beside pixels (Pixtral), in Hugging Face's LLaVA.

Each image is brought to at most the tower's side along its longer edge and to whole patches, a batch is padded to its
largest, and `image_sizes` says what of it is image. So the tokens of an image depend on its size.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import BatchFeature, LlavaProcessor, PixtralImageProcessorPil, PretrainedConfig
from transformers.utils.import_utils import is_torchvision_available

from moellava.errors import UserError
from moellava.model.joined_towers import JoinedTowersConfig
from moellava.model.tower_images import PLAIN
from moellava.model.tower_probes import reads_shapes, shape_of

NATIVE = "native"
"""The value of --image_aspect_ratio."""


class PixtralProcessor(LlavaProcessor):
    """What transformers' class of this name does, which needs torchvision there.

    Args:
        patch_size: of the tower, in pixels.
        spatial_merge_size: patches along each side of what becomes one token.
        image_token, image_break_token, image_end_token: a token; what ends a row of them, and the last one.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template: str | None = None,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
        **kwargs: Any,
    ):
        super().__init__(image_processor, tokenizer, patch_size, chat_template=chat_template, image_token=image_token)
        del self.num_additional_image_tokens, self.vision_feature_select_strategy
        self.spatial_merge_size = spatial_merge_size
        self.image_break_token, self.image_end_token = image_break_token, image_end_token

    def _process_images(self, images: Any, **images_kwargs: Any) -> tuple[BatchFeature, list[str]]:
        return super()._process_images(images, **images_kwargs | {"patch_size": self._side})

    @property
    def _side(self) -> int:
        """Of what becomes one token, in pixels."""
        return self.patch_size * self.spatial_merge_size

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The tokens of an image, row by row."""
        high, wide = (int(length) // self._side for length in image_inputs["image_sizes"][image_idx])
        rows = [self.image_token * wide] * high
        return self.image_break_token.join(rows) + self.image_end_token


def processor_class() -> Any:
    """Pixtral's processor class: transformers' own where torchvision is installed."""
    return transformers.PixtralProcessor if is_torchvision_available() else PixtralProcessor


def shaped_processor(processor: Any, tokenizer: Any, config: PretrainedConfig, chat_template: str | None) -> Any:
    """The processor of a composed model that sees images in their own shape.

    Args:
        processor: the tower's image processor, or one that this function made.
        tokenizer: knows `<image>`.
        config: the composed model's.

    Raises:
        UserError: its tower reads squares alone, or its projector reads whole images.
    """
    vision: Any = config.vision_config
    if isinstance(vision, JoinedTowersConfig) or not reads_shapes(vision):
        raise UserError(
            f"--image_aspect_ratio {NATIVE} needs one tower, which reads images of any shape as Pixtral's does, and a "
            f"projector that gives a token for every patch, as linear and mlp2x_gelu do. This is a {vision.model_type} "
            "tower: use square, pad or anyres."
        )
    shape = shape_of(vision)
    if not isinstance(processor, PixtralImageProcessorPil):
        kept = PLAIN - {"size", "crop_size", "do_center_crop"}
        settings = {name: value for name, value in processor.to_dict().items() if name in kept}
        square = {"height": shape.patch_size, "width": shape.patch_size}
        processor = PixtralImageProcessorPil(**settings, size={"longest_edge": shape.side}, patch_size=square)
    return processor_class()(
        processor,
        tokenizer,
        patch_size=shape.patch_size,
        chat_template=chat_template,
        image_token="<image>",
        image_break_token="",
        image_end_token="",
    )
