# SPDX-License-Identifier: Apache-2.0
"""What a vision model gives for an image, found out by trying, so that none has to be listed.

Hugging Face's LLaVA asks a tower for its hidden states and gives those of one layer to the projector, with or without
the first token. So a few random images are shown, of which some differ in one patch, and the first hidden states tell:

    the same image twice        the same tokens             else it reads a random part of them
    all pixels others           all tokens but the first k  those k are class and register tokens
    one patch's pixels others   one token other             so each patch is a token, and they stand in their order
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PretrainedConfig

from moellava.errors import UserError
from moellava.model.probes import FAILURES, first_line

MOVED = 1e-3
"""A token is another one from this fraction of the largest change on. Rounding is far below, embeddings far above."""

PIXELS = "pixel_values"
"""What LLaVA hands to its tower."""

SIZES = "image_sizes"
"""Heights and widths of the images in a padded batch, as towers take them that read any shape."""

DEVIATION = 0.1
"""Of the random weights that a probe fills a model with."""


class CannotBeTowerError(UserError):
    """A vision model that Hugging Face's LLaVA cannot read; the message ends with the reason that a probe found."""


@dataclass(frozen=True)
class TowerShape:
    """What a tower gives for one image.

    Args:
        side: height and width of the image, in pixels.
        grid: patches along each side of it.
        extras: class and register tokens, which stand before the patches.
        width: of a token.
        in_one_row: whether the images of a batch come as one long row (Pixtral).
    """

    side: int
    grid: int
    extras: int
    width: int
    in_one_row: bool = False

    @property
    def patches(self) -> int:
        """Tokens that are patches."""
        return self.grid**2

    @property
    def patch_size(self) -> int:
        """Height and width of a patch in pixels, as Hugging Face's processor counts: `side // patch_size` patches."""
        return self.side // self.grid


def shape_of(config: PretrainedConfig) -> TowerShape:
    """What a vision model of this config gives, found by a random one of a single layer.

    Raises:
        CannotBeTowerError: no row of patches, with the reason.
    """
    config_class: Any = type(config)
    return _shape_of(config_class, json.dumps(config.to_dict(), sort_keys=True, default=str))


@functools.lru_cache(maxsize=64)
def _shape_of(config_class: Any, fields: str) -> TowerShape:
    config = config_class.from_dict(json.loads(fields))
    check_signature(config)
    side_of(config)
    shallow = copy.deepcopy(config)
    # Also while another model is put together on the meta device, and without a change to the global seed.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        try:
            shallow.num_hidden_layers = 1
            return look(random_model(shallow))
        except (*FAILURES, StrictDataclassError, CannotBeTowerError):  # what says a thing of each layer cannot be cut
            return look(random_model(config))


@functools.lru_cache(maxsize=64)
@torch.no_grad()
def _reads_shapes(config_class: Any, fields: str) -> bool:
    config = config_class.from_dict(json.loads(fields))
    shape = shape_of(config)
    if SIZES not in inspect.signature(MODEL_MAPPING[config_class].forward).parameters or not shape.in_one_row:
        return False
    config.num_hidden_layers = 1
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = random_model(config)
        pixels = torch.zeros(2, 3, *(2 * [2 * shape.patch_size]))
        narrow = torch.randn(3, 2 * shape.patch_size, shape.patch_size)
        pixels[0, :, :, : shape.patch_size], pixels[1] = narrow, torch.randn_like(pixels[1])
        sizes = torch.tensor([[2 * shape.patch_size, shape.patch_size], [2 * shape.patch_size] * 2])
        rows = model(pixels, image_sizes=sizes, output_hidden_states=True).hidden_states[-1]
        alone = model(narrow[None], output_hidden_states=True).hidden_states[-1]
    return rows.shape[:2] == (1, 6) and bool(changes(rows[0, :2], alone[0]).max() <= MOVED * alone.abs().max())


def reads_shapes(config: PretrainedConfig) -> bool:
    """Whether a tower reads images of any shape, told by `image_sizes`: each as it would alone, patch by patch."""
    config_class: Any = type(config)
    return _reads_shapes(config_class, json.dumps(config.to_dict(), sort_keys=True, default=str))


def check_signature(config: PretrainedConfig) -> None:
    """Raises CannotBeTowerError where AutoModel, by which LLaVA builds its tower, has no class for a config, or one
    that asks for more than pixels."""
    try:
        model_class = MODEL_MAPPING.get(type(config), None)
    except FAILURES as error:  # of a library that it needs
        raise CannotBeTowerError(f"AutoModel has no class for it here: {first_line(error)}") from error
    if model_class is None:
        raise CannotBeTowerError("AutoModel, by which LLaVA builds its tower, has no class for it")
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    asked = list(inspect.signature(model_class.forward).parameters.values())[1:]
    if PIXELS not in [one.name for one in asked]:
        raise CannotBeTowerError(f"a {model_class.__name__} takes no {PIXELS}")
    more = [one.name for one in asked if one.default is one.empty and not str(one).startswith("*")]
    if more and more != [PIXELS]:
        raise CannotBeTowerError(f"it asks for {', '.join(name for name in more if name != PIXELS)} beside {PIXELS}")


def random_model(config: PretrainedConfig) -> nn.Module:
    """A vision model with random weights, in evaluation mode.

    Raises:
        CannotBeTowerError: AutoModel, by which LLaVA builds its tower, builds none.
    """
    try:
        model = AutoModel.from_config(config, trust_remote_code=False)
    except FAILURES as error:
        raise CannotBeTowerError(f"AutoModel builds no model for it: {first_line(error)}") from error
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(DEVIATION * torch.randn(parameter.shape, generator=generator))
    return model.float().eval()


def look(model: Any) -> TowerShape:
    """What a vision model, with weights, gives for images of its size. Raises CannotBeTowerError: see `shape_of`."""
    side = side_of(model.config)
    with torch.no_grad():
        image, other = random_images(model, side)
        rows, in_one_row = read_rows(model, torch.stack((image, other)))
        moved = changes(*rows)
        extras, grid = extras_and_grid(moved)
        shape = TowerShape(side, grid, extras, rows.shape[-1], in_one_row)
        check_patches(model, shape, (image, other), rows[0])
    width = getattr(model.config, "hidden_size", None)
    if width != shape.width:
        raise CannotBeTowerError(f"its config's hidden_size is {width}, but its features are {shape.width} wide")
    return shape


def side_of(config: PretrainedConfig) -> int:
    """Height and width of a tower's images, in pixels. Raises CannotBeTowerError: its config names none, or two."""
    named = getattr(config, "image_size", None)
    side, *others = sorted(set(named)) if isinstance(named, list | tuple) and named else [named]
    if others or not isinstance(side, int) or side < 1:
        raise CannotBeTowerError(f"its config's image_size is {named}, which is no side of a square image")
    return side


def random_images(model: Any, side: int) -> Tensor:
    """[2, 3, side, side]: two images that differ in all pixels. Raises CannotBeTowerError: it reads no RGB."""
    channels = getattr(model.config, "num_channels", 3)
    if channels != 3:
        raise CannotBeTowerError(f"it reads images of {channels} channels, not of red, green and blue")
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)


def states_of(model: Any, pixels: Tensor) -> tuple[Tensor, ...]:
    """What LLaVA chooses from: the hidden states of pixels [B, 3, H, W], as the model gives them.

    Raises:
        CannotBeTowerError: it does not run on pixels alone, or gives no rows of tokens, equally long in all layers.
    """
    try:
        states = model(pixels, return_dict=True, output_hidden_states=True).hidden_states
    except FAILURES as error:
        raise CannotBeTowerError(f"it does not run on pixels alone: {first_line(error)}") from error
    if not isinstance(states, tuple) or len(states) < 2 or not all(isinstance(state, Tensor) for state in states):
        raise CannotBeTowerError("it gives no hidden states, from which LLaVA takes its features")
    shapes = list(dict.fromkeys(tuple(state.shape) for state in states))
    if any(len(shape) != 3 for shape in shapes):
        raise CannotBeTowerError(f"its hidden states are grids of the shape {in_words(shapes)}, no rows of tokens")
    if len(shapes) > 1:
        raise CannotBeTowerError(f"its hidden states change their shape from layer to layer: {in_words(shapes)}")
    return states


def in_words(shapes: list[tuple[int, ...]]) -> str:
    """Shapes without the axis of images, for a message."""
    return ", ".join(" × ".join(map(str, shape[1:])) for shape in shapes[:3])


def read_rows(model: Any, pixels: Tensor) -> tuple[Tensor, bool]:
    """The first hidden states [B, T, D] of pixels [B, 3, H, W], and whether they came in one row. Raises
    CannotBeTowerError: see `states_of`."""
    first, images = states_of(model, pixels)[0].float(), len(pixels)
    if len(first) == images:
        return first, False
    if len(first) == 1 and first.shape[1] % images == 0:
        return first.reshape(images, -1, first.shape[-1]), True
    raise CannotBeTowerError(f"of {images} images it makes {len(first)} rows of tokens")


def changes(one: Tensor, other: Tensor) -> Tensor:
    """[T, D] twice -> [T]: by how much each token differs."""
    return (one - other).abs().amax(-1)


def extras_and_grid(moved: Tensor) -> tuple[int, int]:
    """Tokens before the patches, and patches along a side, from how much each token [T] changes with all pixels.

    Raises:
        CannotBeTowerError: nothing changes, other tokens stand elsewhere, or the patches are no square.
    """
    if not moved.max() > 0:
        raise CannotBeTowerError("its first hidden states do not depend on the pixels")
    is_patch = (moved > MOVED * moved.max()).tolist()
    patches, extras = sum(is_patch), is_patch.index(True)
    if not all(is_patch[extras : extras + patches]):
        raise CannotBeTowerError("tokens that are no patches stand among its patches")
    if extras + patches < len(is_patch):
        raise CannotBeTowerError(f"{len(is_patch) - extras - patches} tokens that are no patches stand behind them")
    grid = math.isqrt(patches)
    if grid**2 != patches:
        raise CannotBeTowerError(f"its {patches} patches are no square")
    return extras, grid


def check_patches(model: Any, shape: TowerShape, images: tuple[Tensor, Tensor], tokens: Tensor) -> None:
    """Sees to it that each patch of pixels becomes the one token that stands in its place, row by row.

    Args:
        images: two that differ in all pixels, [3, side, side] each.
        tokens: [T, width], of the first.

    Raises:
        CannotBeTowerError: it becomes none, several, or another one; or the first image other tokens than before.
    """
    size, last, (image, other) = shape.patch_size, shape.grid - 1, images
    places = sorted({(0, 0), (0, last), (last, 0)})
    pictures = [image]
    for row, column in places:
        high, wide = slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size)
        pictures.append(image.clone())
        pictures[-1][:, high, wide] = other[:, high, wide]
    again, *rows = read_rows(model, torch.stack(pictures))[0]
    if again.shape != tokens.shape or changes(again, tokens).max() > MOVED * tokens.abs().max():
        raise CannotBeTowerError("it gives other features each time that it sees the same image")
    if shape.side // size != shape.grid:
        raise CannotBeTowerError(f"its {shape.grid} × {shape.grid} patches do not tile images of {shape.side} pixels")
    for (row, column), changed in zip(places, rows, strict=True):
        moved = changes(changed, again)
        found = torch.nonzero(moved > MOVED * moved.max()).flatten().tolist()
        if found != [shape.extras + row * shape.grid + column]:
            wrong = "not the one in its place" if len(found) == 1 else "not one"
            raise CannotBeTowerError(
                f"one patch of pixels changes {len(found)} tokens of its first hidden states, {wrong}"
            )
