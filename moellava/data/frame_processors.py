# SPDX-License-Identifier: Apache-2.0
"""Video processors for Pillow, where torchvision is not installed and transformers' own cannot be had.

Each does to the frames that it gets what transformers' class for the architecture does, by the same settings, which are
saved with the processor as that class would save them. It never chooses frames. Resized pixels differ from
torchvision's by rounding, one or two of 255 levels. Here is what the recipes of `architectures/` share.

Shapes: T frames of a video, H × W pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
import transformers
from einops import rearrange
from PIL import Image
from transformers import CLIPImageProcessorPil
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.utils.import_utils import is_torchvision_available
from transformers.video_utils import VideoMetadata

from moellava.data.plain_pixels import untried

Settings = dict[str, Any]

COMMON: Settings = {
    "resample": 3,  # bicubic
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": OPENAI_CLIP_MEAN,
    "image_std": OPENAI_CLIP_STD,
    "do_convert_rgb": True,
}
"""What all recipes have in common, with transformers' defaults."""

LLAVA = COMMON | {"do_center_crop": False, "crop_size": None, "do_sample_frames": False}
"""Settings of frames that `whole_frames` takes."""

QWEN = COMMON | {"temporal_patch_size": 2, "merge_size": 2, "cap_pixels_per_frame": None}
"""Settings of frames that `Patched` takes."""

AREAS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
"""Settings of older files -> the part of `size` that they are today."""

PIXELS = ("resample", "do_resize", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
"""Settings that an image processor takes as they are."""


class FrameProcessor(dict):
    """A video processor by its settings, which are what it is as a dict.

    Args:
        recipe: what it does with frames.
        given: settings from the model's folder; all of them are kept.
    """

    _auto_class: ClassVar[None] = None
    model_input_names: ClassVar[list[str]] = ["pixel_values_videos"]

    def __init__(self, recipe: FrameRecipe, given: Settings):
        known = {name: value for name, value in given.items() if value is not None}
        super().__init__({**recipe.defaults, **known})
        self.recipe = recipe
        if not self.reads_videos:
            return
        self.setdefault("video_processor_type", recipe.class_name)
        self["size"] = self["size"] | {AREAS[name]: known[name] for name in AREAS if name in known}

    def __reduce__(self) -> tuple[Any, ...]:
        """As it goes to workers: one of the same settings."""
        return FrameProcessor, (self.recipe, dict(self))

    @property
    def reads_videos(self) -> bool:
        """Whether this is known to do what transformers' class does."""
        return self.recipe != UNKNOWN

    def __getattr__(self, name: str) -> Any:
        """A setting, which is how processors ask for it."""
        if name in self:
            return self[name]
        raise AttributeError(f"{type(self).__name__} has no setting {name!r}")

    def __call__(
        self, videos: Sequence[Any], video_metadata: Sequence[Settings] | None = None, **_: Any
    ) -> dict[str, Any]:
        """The model's inputs of several videos, and `video_metadata`, as `VideoMetadata`.

        Args:
            videos: frames of each; or a list of videos for each text, as SmolVLM's processor of transformers 5.20 has.

        Raises:
            ValueError: frames of a shape that the recipe refuses.
        """
        flat = videos if isinstance(videos[0][0], Image.Image) else list(chain.from_iterable(videos))
        metadata = [{"total_num_frames": len(video)} for video in flat] if video_metadata is None else video_metadata
        tensors = self.recipe.tensors(self, [list(video) for video in flat])
        return {**tensors, "video_metadata": [VideoMetadata(**one) for one in metadata]}


@dataclass(frozen=True)
class FrameRecipe:
    """What an architecture does with the frames of a video.

    Attributes:
        class_name: transformers' class that does the same.
        defaults: its settings.
        tensors: (settings, videos) -> the model's inputs.
    """

    class_name: str
    defaults: Settings
    tensors: Callable[[Settings, list[list[Image.Image]]], dict[str, torch.Tensor]]


def pixels_of(settings: Settings, frames: Sequence[Image.Image], **sizes: Any) -> torch.Tensor:
    """Frames resized, cropped and normalised, [T, 3, H, W]; `sizes` take the place of settings."""
    options = {name: settings[name] for name in PIXELS} | {"do_center_crop": False} | sizes
    processor = CLIPImageProcessorPil(**options)
    plain = untried(processor)
    return plain(frames) if plain else processor(list(frames), return_tensors="pt")["pixel_values"]


def whole_frames(settings: Settings, videos: list[list[Image.Image]]) -> dict[str, torch.Tensor]:
    """As LLaVA's: frames of one size, `pixel_values_videos` [videos, T, 3, H, W]."""
    sizes = {"size": settings["size"]}
    if settings["do_center_crop"]:
        sizes |= {"do_center_crop": True, "crop_size": settings["crop_size"]}
    return {"pixel_values_videos": torch.stack([pixels_of(settings, frames, **sizes) for frames in videos])}


Fit = Callable[[Settings, int, int, int], tuple[int, int]]
"""(settings, T, height, width) -> the height and width that frames are resized to."""


@dataclass(frozen=True)
class Patched:
    """As Qwen's: `pixel_values_videos` [patches, 3 · t · p · p], each of p × p pixels in t frames, square after
    square of m × m patches; and `video_grid_thw` [videos, 3], in patches.

    p, t and m are `patch_size`, `temporal_patch_size` and `merge_size`. The last frame is repeated to fill its patches.

    Args:
        fit: says how large frames are made.
    """

    fit: Fit

    def __call__(self, settings: Settings, videos: list[list[Image.Image]]) -> dict[str, torch.Tensor]:
        side, merge, time = settings["patch_size"], settings["merge_size"], settings["temporal_patch_size"]
        rows, grids = [], []
        for frames in videos:
            width, height = frames[0].size
            if settings["do_resize"]:
                height, width = self.fit(settings, len(frames), height, width)
            pixels = pixels_of(settings, frames, size={"height": height, "width": width})
            pixels = torch.cat([pixels, pixels[-1:].expand(-len(frames) % time, -1, -1, -1)])
            order = "(T t) c (H m p) (W n q) -> (T H W m n) (c t p q)"
            rows.append(rearrange(pixels, order, t=time, m=merge, n=merge, p=side, q=side))
            grids.append([len(pixels) // time, height // side, width // side])
        return {"pixel_values_videos": torch.cat(rows), "video_grid_thw": torch.tensor(grids)}


def fitted(shape: tuple[int, int, int], factor: int, time: int, least: int, most: int) -> tuple[int, int]:
    """The nearest multiples of `factor` to (T, height, width)'s last two, or those that bring the pixels of all frames,
    T taken as a multiple of `time`, between `least` and `most`.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    frames, height, width = shape
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"frames of {width} × {height} pixels: one side is more than 200 times the other")
    fitted = [round(side / factor) for side in (height, width)]
    area = round(frames / time) * time * math.prod(fitted) * factor**2
    if area > most:
        scale = math.sqrt(frames * height * width / most)
        fitted = [max(1, math.floor(side / scale / factor)) for side in (height, width)]
    elif area < least:
        scale = math.sqrt(least / (frames * height * width))
        fitted = [math.ceil(side * scale / factor) for side in (height, width)]
    return fitted[0] * factor, fitted[1] * factor


def no_frames(settings: Settings, videos: list[list[Image.Image]]) -> dict[str, torch.Tensor]:
    """Nothing of them."""
    return {}


UNKNOWN = FrameRecipe("", {}, no_frames)
"""Of an architecture without a recipe: its settings are kept, and a video is shown as images."""

ONEVISION = FrameRecipe("LlavaOnevisionVideoProcessor", LLAVA | {"size": {"height": 384, "width": 384}}, whole_frames)
"""Of LLaVA-OneVision, released or composed."""


@functools.cache
def with_frames(cls: Any) -> Any:
    """`cls`, taking a video processor of ours for one of transformers'."""

    def check_argument_for_proper_class(self: Any, argument_name: str, argument: Any) -> Any:
        if isinstance(argument, FrameProcessor):
            return FrameProcessor
        return cls.check_argument_for_proper_class(self, argument_name, argument)

    def __reduce__(self: Any) -> tuple[Any, ...]:
        return _with_frames_again, (cls, vars(self))

    attributes: dict[str, Any] = {one.__name__: one for one in (check_argument_for_proper_class, __reduce__)}
    # Of the same name, which is what the processor writes into its folder.
    return type(cls.__name__, (cls,), attributes | {"__module__": __name__})


def _with_frames_again(cls: Any, state: dict[str, Any]) -> Any:
    """What `with_frames(cls)` was made of, in a worker: it cannot find that class by its name."""
    made = object.__new__(with_frames(cls))
    vars(made).update(state)
    return made


def onevision_frames(settings: Settings) -> Any:
    """LLaVA-OneVision's video processor in these settings: transformers' own where torchvision is installed."""
    if is_torchvision_available():
        return transformers.LlavaOnevisionVideoProcessor(**settings)
    return FrameProcessor(ONEVISION, settings)
