# SPDX-License-Identifier: Apache-2.0
"""What Hugging Face's LLaVA has no tower for: towers whose class and register tokens are left out, and several towers.

Hugging Face's class drops the first token of a tower or none. Where two and more stand before the patches (DINOv2 with
registers: 5), or where the patches of two towers are joined along their channels (Prismatic, arXiv:2402.07865;
Cambrian, arXiv:2406.16860), its `vision_tower` is this model, and nothing else of it changes:

    pixel_values  [B, 3, sum of the sides, widest]     the towers' pictures, one below the other
    hidden_states[layer]  [B, P, sum of the widths]    the patches of each tower, joined token by token

Its `model_type` is registered by moellava alone, so that plain transformers cannot open such a folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from moellava.errors import UserError
from moellava.model.tower_probes import TowerShape, shape_of


class JoinedTowersConfig(PretrainedConfig):
    """The configs of one or several towers, and what the probes found of each.

    Args:
        towers: config of each, as a dictionary.
        extras: class and register tokens of each, which are left out.
        sides: height and width of each one's images, in pixels.
        patches: of one image; the same for all.
        hidden_size: width of a joined patch.
        image_size: height and width of what they see together, in pixels.
        num_hidden_layers: of the one that has fewest.
    """

    model_type: ClassVar[str] = "moellava_towers"

    def __init__(
        self,
        towers: Sequence[dict[str, Any]] = (),
        extras: Sequence[int] = (),
        sides: Sequence[int] = (),
        patches: int = 0,
        hidden_size: int = 0,
        image_size: Sequence[int] = (0, 0),
        num_hidden_layers: int = 0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.towers, self.extras, self.sides, self.patches = list(towers), list(extras), list(sides), patches
        self.hidden_size, self.image_size, self.num_hidden_layers = hidden_size, list(image_size), num_hidden_layers

    @property
    def configs(self) -> list[PretrainedConfig]:
        """The config of each tower."""
        return [AutoConfig.for_model(**fields) for fields in self.towers]

    @property
    def reason(self) -> str:
        """Why plain transformers cannot hold it."""
        names = [str(fields["model_type"]) for fields in self.towers]
        if len(names) > 1:
            return (
                f"the patches of its towers ({', '.join(names)}) are joined, and LlavaForConditionalGeneration has one"
            )
        if not self.extras[0]:
            return (
                f"its tower ({names[0]}) gives the images of a batch in one row, which its projector cannot tell apart"
            )
        return (
            f"its tower ({names[0]}) has {self.extras[0]} tokens before the patches, all left out, and "
            "LlavaForConditionalGeneration leaves out one"
        )


def join(configs: Sequence[PretrainedConfig]) -> JoinedTowersConfig:
    """The config of towers whose patches are joined. Raises UserError where their numbers of patches differ."""
    shapes = [shape_of(config) for config in configs]
    if len({shape.patches for shape in shapes}) > 1:
        each = " and ".join(
            f"{shape.patches} ({config.model_type}, {shape.grid} × {shape.grid} of {shape.side} pixels)"
            for config, shape in zip(configs, shapes, strict=True)
        )
        raise UserError(
            f"--image_tower: features are joined patch by patch, but the towers give {each} patches of an image. Take "
            "towers whose image_size holds equally many patches."
        )
    return JoinedTowersConfig(
        towers=[config.to_dict() for config in configs],
        extras=[shape.extras for shape in shapes],
        sides=[shape.side for shape in shapes],
        patches=shapes[0].patches,
        hidden_size=sum(shape.width for shape in shapes),
        image_size=(sum(shape.side for shape in shapes), max(shape.side for shape in shapes)),
        num_hidden_layers=min(config.num_hidden_layers for config in configs),
    )


class JoinedTowers(PreTrainedModel):
    """The towers side by side. See `JoinedTowersConfig`."""

    config_class = JoinedTowersConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: JoinedTowersConfig):
        super().__init__(config)
        # Of the dtype that the whole model is built in, not of the one that a tower's config remembers.
        dtype = torch.get_default_dtype()
        self.towers = nn.ModuleList(
            AutoModel.from_config(one, dtype=dtype, trust_remote_code=False) for one in config.configs
        )
        self.post_init()

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | int = True, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Features of images.

        Args:
            pixel_values: [B, 3, H, W], see `stacked`.
            output_hidden_states: the index of the hidden states that are read; True: all that every tower has, counted
                from the end.
        """
        states = self.config.num_hidden_layers + 1
        layers = range(-states, 0) if isinstance(output_hidden_states, bool) else [output_hidden_states]
        found: list[Any] = [None] * states
        rows = [self._states(number, pixels) for number, pixels in enumerate(self._split(pixel_values))]
        for layer in layers:
            found[layer] = torch.cat([states[layer] for states in rows], dim=-1)
        return BaseModelOutputWithPooling(hidden_states=tuple(found))

    def _split(self, pixel_values: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> the picture [B, 3, side, side] of each tower."""
        pictures, top = [], 0
        for side in self.config.sides:
            pictures.append(pixel_values[:, :, top : top + side, :side])
            top += side
        return pictures

    def _states(self, number: int, pixels: Tensor) -> list[Tensor]:
        """The hidden states of one tower, [B, P, width] each."""
        output = self.towers[number](pixels, return_dict=True, output_hidden_states=True)
        extras, patches = self.config.extras[number], self.config.patches
        # A tower that takes the images of a batch for one row (Pixtral) gives [1, B · P, width].
        return [state.reshape(len(pixels), extras + patches, -1)[:, extras:] for state in output.hidden_states]


AutoConfig.register(JoinedTowersConfig.model_type, JoinedTowersConfig)
AutoModel.register(JoinedTowersConfig, JoinedTowers)


def stacked(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures [B, 3, side, side] of several sides -> [B, 3, sum of the sides, widest], zeros beside smaller ones."""
    widest = max(picture.shape[-1] for picture in pictures)
    return torch.cat([nn.functional.pad(one, (0, widest - one.shape[-1])) for one in pictures], dim=2)


def joined_shape(config: JoinedTowersConfig) -> TowerShape:
    """What the towers give together; `side` is that of the first."""
    return TowerShape(config.sides[0], math.isqrt(config.patches), 0, config.hidden_size)
