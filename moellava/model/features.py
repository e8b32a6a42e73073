# SPDX-License-Identifier: Apache-2.0
"""What images and videos become for the language model, computed once: kept by what is shown, while there is room.

`generate` of transformers takes such features in place of pixels (`mm_encoder_outputs`), whatever the class. A picture
is then encoded once, however often it is asked about: in one batch, turn after turn, or by one request after another.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

FEATURE_BYTES = 2**28
"""Features that a model keeps: in half precision those of 56 images of 576 tokens of 4,096 numbers."""

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""Modality -> what `get_{modality}_features` calls its main input."""

GRIDS = ("image_grid_thw", "video_grid_thw")
"""Arguments that say how many rows of the pixels each picture has: the product of three numbers. Without one of them it
is one row, of one picture or of one tile."""

PER_PICTURE = {*PIXELS.values(), *GRIDS, "image_sizes", "image_merge_sizes", "video_merge_sizes"}
PER_PICTURE |= {"pixel_attention_mask", "batch_num_images"}
"""Arguments that hold one row for each picture. Where there are others, a batch's features are kept as a whole."""

READ_MORE = {"blip-2", "fuyu", "granite4_vision", "granite_docling", "instructblip", "instructblipvideo", "ovis2"}
READ_MORE |= {"llama4"}
"""Types of models that read more of the encoder's output than `Features` holds: nothing of theirs is kept."""


@dataclass
class Features:
    """What one picture became, or a batch where pictures cannot be told apart.

    Args:
        output: the class of the encoder's output.
        pooled: its `pooler_output`: for each picture the features [tokens, D]; or one tensor with a dimension before.
        is_tensor: whether it is one tensor.
        deep: the same of each layer of `deepstack_features` (Qwen3-VL); None where there are none.
    """

    output: Callable[..., Any]
    pooled: list[Tensor]
    is_tensor: bool
    deep: list[list[Tensor]] | None

    @property
    def bytes(self) -> int:
        """Memory."""
        return sum(tensor.nbytes for tensor in self._all())

    def _all(self) -> Iterator[Tensor]:
        yield from self.pooled
        for layer in self.deep or []:
            yield from layer

    def owned(self) -> Features:
        """The same in memory of its own: a view would keep the whole batch's."""
        deep = None if self.deep is None else [[tensor.clone() for tensor in layer] for layer in self.deep]
        return Features(self.output, [tensor.clone() for tensor in self.pooled], self.is_tensor, deep)

    def of_picture(self, index: int) -> Features:
        """Those of one picture of a batch."""
        pooled = self.pooled[0][index : index + 1] if self.is_tensor else self.pooled[index]
        deep = None if self.deep is None else [[layer[index]] for layer in self.deep]
        return Features(self.output, [pooled], self.is_tensor, deep)

    def are_of(self, count: int) -> bool:
        """Whether they are told apart by picture."""
        pooled = len(self.pooled[0]) if self.is_tensor else len(self.pooled)
        return pooled == count and all(len(layer) == count for layer in self.deep or [])


def features_of(output: Any) -> Features | None:
    """The parts of an encoder's output that a language model reads; None where they are something else."""
    pooled, deep = getattr(output, "pooler_output", None), getattr(output, "deepstack_features", None)
    is_tensor = isinstance(pooled, Tensor)
    listed = [pooled] if is_tensor else list(pooled or [])
    if not listed or not all(isinstance(layer, list | tuple) for layer in deep or []):
        return None
    layers = None if deep is None else [list(layer) for layer in deep]
    if not all(isinstance(tensor, Tensor) for layer in [listed, *(layers or [])] for tensor in layer):
        return None
    return Features(type(output), listed, is_tensor, layers)


def joined(parts: Sequence[Features]) -> Any:
    """The encoder's output for several pictures."""
    first = parts[0]
    pooled: Any = [tensor for part in parts for tensor in part.pooled]
    fields = {"pooler_output": torch.cat(pooled) if first.is_tensor else pooled}
    if first.deep is not None:
        layers = zip(*(part.deep or [] for part in parts), strict=True)
        fields["deepstack_features"] = [[tensor for part in layer for tensor in part] for layer in layers]
    return first.output(**fields)


class FeatureCache:
    """Features of the pictures that a model has been shown; the ones not used for longest go first.

    It is empty again once the weights of tower or projector have changed. A copy of it is empty.

    Args:
        limit: bytes kept.

    Attributes:
        joint: modalities whose encoder's output is not one part for each picture; that of a batch is then kept as one.
    """

    def __init__(self, limit: int = FEATURE_BYTES):
        self.limit, self.bytes = limit, 0
        self.kept: OrderedDict[bytes, Features] = OrderedDict()
        self.weights: Any = None
        self.joint: set[str] = set()
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return type(self), (self.limit,)

    @torch.no_grad()
    def encoded(self, model: Any, inputs: Mapping[str, Any], shown: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of a model's `generate`, with features in place of pixels where its class takes them.

        Args:
            model: in evaluation mode.
            inputs: on the model's device.
            shown: the same as they came, which say what is shown.
        """
        result, outputs = dict(inputs), dict[str, Any]()
        for modality, pixels in PIXELS.items():
            encode = encoder_of(model, modality)
            if encode is None or not isinstance(inputs.get(pixels), Tensor):
                continue
            if not outputs:
                self._follow(model)
            names = [name for name in inspect.signature(encode).parameters if name in inputs]
            given = [{name: mapping[name] for name in names} for mapping in (inputs, shown)]
            outputs[modality] = self._encode(modality, encode, *given)
            del result[pixels]
        return result | ({"mm_encoder_outputs": outputs} if outputs else {})

    def _encode(self, modality: str, encode: Callable[..., Any], inputs: dict[str, Any], shown: dict[str, Any]) -> Any:
        """The encoder's output for all pictures, of which only those are encoded that are not known."""
        pictures = None if modality in self.joint else cut(shown, PIXELS[modality])
        keys = [key_of(one) for one in ([shown] if pictures is None else pictures)]
        known = self._known(keys)
        missing = sorted({key: index for index, key in reversed([*enumerate(keys)]) if key not in known}.values())
        if missing:
            asked = inputs
            if len(missing) < len(keys):
                parts = cut(inputs, PIXELS[modality]) or []
                asked = {name: torch.cat([parts[index][name] for index in missing]) for name in inputs}
            output = encode(**asked, return_dict=True)
            features = features_of(output)
            if pictures is not None and (features is None or not features.are_of(len(missing))):
                self.joint.add(modality)
                return self._encode(modality, encode, inputs, shown)
            if features is None:
                return output
            for place, index in enumerate(missing):
                part = features if pictures is None else features.of_picture(place)
                known[keys[index]] = self._keep(keys[index], part)
            if asked is inputs:
                return output
        return joined([known[key] for key in keys])

    def _known(self, keys: Sequence[bytes]) -> dict[bytes, Features]:
        with self.lock:
            known = {key: self.kept[key] for key in keys if key in self.kept}
            for key in known:
                self.kept.move_to_end(key)
        return known

    def _keep(self, key: bytes, features: Features) -> Features:
        features = features.owned()
        with self.lock:
            if features.bytes <= self.limit and key not in self.kept:
                self.kept[key] = features
                self.bytes += features.bytes
            while self.bytes > self.limit:
                self.bytes -= self.kept.popitem(last=False)[1].bytes
        return features

    def _follow(self, model: Any) -> None:
        """Forgets everything if the weights are others than those that it is of."""
        weights = sample_of_weights(model)
        with self.lock:
            if weights != self.weights:
                self.kept.clear()
                self.bytes, self.weights = 0, weights


def encoder_of(model: Any, modality: str) -> Callable[..., Any] | None:
    """What turns pixels into features; None where a model's class does not take features, or reads more of them."""
    takes = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    if not takes or model.config.model_type.removeprefix("moellava_") in READ_MORE:
        return None
    encode = getattr(model.base_model, f"get_{modality}_features", None)
    return encode if encode is not None and PIXELS[modality] in inspect.signature(encode).parameters else None


def cut(arguments: Mapping[str, Any], pixels: str) -> list[dict[str, Tensor]] | None:
    """An encoder's arguments for each picture; None where they are not told apart."""
    if not arguments.keys() <= PER_PICTURE or not all(isinstance(value, Tensor) for value in arguments.values()):
        return None
    grid = next((arguments[name] for name in GRIDS if name in arguments), None)
    rows = [1] * len(arguments[pixels]) if grid is None else grid.prod(-1).tolist()
    others = [value for name, value in arguments.items() if name != pixels]
    if sum(rows) != len(arguments[pixels]) or any(len(value) != len(rows) for value in others):
        return None  # OneVision counts the images of each text, which it does not cut into tiles where there are more
    if not arguments[pixels].flatten(1).any(1).all():
        return None  # Idefics and SmolVLM fill up rows with blank images, and read one of them if there is nothing else
    parts = {name: value.split(rows if name == pixels else 1) for name, value in arguments.items()}
    return [dict(zip(parts, one, strict=True)) for one in zip(*parts.values(), strict=True)]


def key_of(arguments: Mapping[str, Any]) -> bytes:
    """What tells one picture from another: a hash of all its encoder sees, blank tiles at its end aside."""
    digest = blake2b(digest_size=16)
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            digest.update(f"{name} {value!r}".encode())
            continue
        if "image_sizes" in arguments and value.dim() == 5 and len(value) == 1:  # tiles, as many as the batch's most
            value = value[:, : int(value[0].flatten(1).any(1).nonzero().max()) + 1]
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.digest()


def sample_of_weights(model: Any) -> Any:
    """Where the parameters outside the decoder lie, and some numbers of each."""
    inside = {id(parameter) for parameter in model.get_decoder().parameters()}
    outside = [one for one in model.parameters() if id(one) not in inside and one.device.type != "meta" and one.numel()]
    numbers: dict[torch.device, list[Tensor]] = {}
    for one in outside:
        numbers.setdefault(one.device, []).append(one.detach().flatten()[:: max(one.numel() // 4, 1)].float())
    return [one.data_ptr() for one in outside], [torch.cat(some).tolist() for some in numbers.values()]
