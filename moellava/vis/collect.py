# SPDX-License-Identifier: Apache-2.0
"""Which expert each token of some records went to, in every sparse layer, and where the token stands.

Legend: T tokens of all samples, L sparse layers, k choices.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from moellava.batches import spread
from moellava.data.collate import PLACEHOLDERS, RECORDS, UNREADABLE
from moellava.data.dataset import SupervisedDataset
from moellava.data.media_reader import Run
from moellava.data.video import Video
from moellava.moe import set_routing_context
from moellava.moe.watch import Routed, require_experts, require_heard, watched_routing
from moellava.vis.patches import Grid, Shown, grids_of, stretches_of
from moellava.vis.words import WORD_CLASSES, word_classes
from moellava.vlm import VLM

LARGEST_PICTURE = 320
"""Longest side in pixels of a picture that a map lies over."""


@dataclass
class Picture:
    """An image or a video of a sample.

    Attributes:
        name: of its record.
        first, length: its run among the T tokens.
        grids: where its tokens lie; empty where they are no grid.
        image: what the tower was shown, or the picture itself; small.
    """

    name: str
    first: int
    length: int
    grids: list[Grid]
    image: Image.Image


@dataclass
class Collected:
    """Routing of some samples.

    Attributes:
        model: what the user called it.
        layers, experts: index and number of experts of each sparse layer.
        records: names of the samples.
        sample_T, position_T: which sample a token is of, and its place there.
        image_T: whether it is one of an image or a video.
        token_T, text_T: its id, and what it reads.
        word_T: index in `WORD_CLASSES`; -1 for tokens of images.
        trained_T: whether it is part of an answer.
        grid_T, row_T, column_T: which of its image's grids it lies in, and where; -1: in none.
        expert_TLk: the experts, best first; -1: fewer than k.
        gate_TLk: weights of their outputs.
        kept_TLk: False where an expert was full.
        entropy_TL: of the router, in nats; NaN: not known.
        pictures: images and videos, in order.
    """

    model: str
    layers: list[int]
    experts: list[int]
    records: list[str]
    sample_T: np.ndarray
    position_T: np.ndarray
    image_T: np.ndarray
    token_T: np.ndarray
    text_T: list[str]
    word_T: np.ndarray
    trained_T: np.ndarray
    grid_T: np.ndarray
    row_T: np.ndarray
    column_T: np.ndarray
    expert_TLk: np.ndarray
    gate_TLk: np.ndarray
    kept_TLk: np.ndarray
    entropy_TL: np.ndarray
    pictures: list[Picture] = field(default_factory=list)


@torch.no_grad()
def collect(vlm: VLM, dataset: SupervisedDataset, count: int, batch_size: int) -> Collected:
    """Runs samples through a sparse model, and notes where their tokens went.

    Args:
        vlm: the model.
        dataset: of its encoder.
        count: how many samples, spread evenly over the data.
        batch_size: samples that run together.

    Raises:
        UserError: the model is dense, or does not tell its routing.
    """
    require_experts(vlm.model, vlm.source)
    vlm.model.eval()
    chosen, collator, parts = spread(len(dataset), count), vlm.collator(), _Parts(vlm)
    with watched_routing(vlm.model) as watch:
        for start in range(0, len(chosen), batch_size):
            samples = [dataset[index] for index in chosen[start : start + batch_size]]
            batch = collator(samples)
            _forward(vlm, batch)
            parts.add(samples, batch, require_heard(watch.take(), vlm.model))
    set_routing_context(vlm.model)
    return parts.joined()


def _forward(vlm: VLM, batch: dict[str, Any]) -> None:
    """One forward, without logits where the class lets them be left out."""
    model = vlm.model
    token_mask, image_mask = masks_of(vlm, batch)
    set_routing_context(model, token_mask=token_mask.to(model.device), image_mask=image_mask.to(model.device))
    inputs = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in batch.items()
        if name not in ("labels", UNREADABLE, RECORDS)
    }
    takes = inspect.signature(model.forward).parameters
    few = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    model(**inputs, use_cache=False, **few)


def masks_of(vlm: VLM, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens [B, L] are real, and which of them are of images or videos."""
    token_mask = batch["attention_mask"].bool()
    image_ids = batch["input_ids"].new_tensor(vlm.placeholder_ids)
    return token_mask, torch.isin(batch["input_ids"], image_ids) & token_mask


class _Parts:
    """What batches add to `Collected`."""

    def __init__(self, vlm: VLM):
        self.vlm = vlm
        self.special = set(vlm.tokenizer.all_special_ids) | {
            index for index, token in vlm.tokenizer.added_tokens_decoder.items() if token.special
        }
        self.texts: dict[int, str] = {}
        self.columns: dict[str, list[np.ndarray]] = {}
        self.text: list[str] = []
        self.records: list[str] = []
        self.pictures: list[Picture] = []
        self.layers: list[int] = []
        self.experts: list[int] = []

    def add(self, samples: Sequence[dict[str, Any]], batch: dict[str, Any], routed: Sequence[Routed]) -> None:
        token_mask, image_mask = masks_of(self.vlm, batch)
        self.layers = [one.layer for one in routed]
        self.experts = [one.n_experts for one in routed]
        routing = routing_of(routed, token_mask)
        rows = np.nonzero(token_mask.numpy().reshape(-1))[0]
        for name, values in routing.items():
            self._put(name, values[rows])
        begin = len(self.text)
        for number, sample in enumerate(samples):
            keeps = token_mask[number]
            ids, labels = batch["input_ids"][number][keeps], batch["labels"][number][keeps]
            self._put("sample_T", np.full(len(ids), len(self.records)))
            self._put("position_T", np.arange(len(ids)))
            self._put("image_T", image_mask[number][keeps].numpy())
            self._put("token_T", ids.numpy())
            self._put("trained_T", (labels >= 0).numpy())
            self._words(ids.tolist(), image_mask[number][keeps].tolist())
            places = np.full((3, len(ids)), -1)
            for picture in self._pictures(sample, ids.tolist(), begin):
                self.pictures.append(picture)
                for index, grid in enumerate(picture.grids):
                    for place, row, column in grid.places():
                        places[:, picture.first - begin + place] = index, row, column
            for name, values in zip(("grid_T", "row_T", "column_T"), places, strict=True):
                self._put(name, values)
            self.records.append(sample["record"])
            begin += len(ids)

    def _put(self, name: str, values: np.ndarray) -> None:
        self.columns.setdefault(name, []).append(values)

    def _words(self, ids: Sequence[int], is_image: Sequence[bool]) -> None:
        texts = [self._read(index) for index in ids]
        classes = word_classes(texts, [index in self.special for index in ids])
        codes = [-1 if image else WORD_CLASSES.index(one) for one, image in zip(classes, is_image, strict=True)]
        self.text += texts
        self._put("word_T", np.array(codes))

    def _read(self, index: int) -> str:
        """What a token reads, with the space before it, which a decoder drops at the begin of a text."""
        if index not in self.texts:
            marked = self.vlm.tokenizer.convert_ids_to_tokens(index) or ""
            text = self.vlm.tokenizer.decode([index])
            spaced = marked[:1] in ("▁", "Ġ") and not text.startswith(" ")
            self.texts[index] = f" {text}" if spaced else text
        return self.texts[index]

    def _pictures(self, sample: dict[str, Any], ids: Sequence[int], begin: int) -> Iterator[Picture]:
        """The images and videos of a sample, with their runs."""
        if not sample["media"] or not self.vlm.reader.loads_images:
            return
        media = self.vlm.reader.read([sample["media"]])
        runs, place = iter(media.runs[0]), begin
        shown = iter(shown_of(self.vlm, sample["media"], media.tensors))
        for token in sample["input_ids"].tolist():
            if token not in PLACEHOLDERS:
                place += 1
                continue
            run: Run = next(runs)
            facts, image = next(shown)
            if ids[place - begin : place - begin + len(run.ids)] != run.ids:
                return  # a class whose collator makes other runs: nothing is known of places in its images
            is_patch = [index in self.vlm.placeholder_ids for index in run.ids]
            stretches = stretches_of(is_patch, [self._read(index) for index in run.ids])
            yield Picture(sample["record"], place, len(run.ids), grids_of(stretches, facts), image)
            place += len(run.ids)

    def joined(self) -> Collected:
        arrays = {name: np.concatenate(parts) for name, parts in self.columns.items()}
        return Collected(
            model=self.vlm.source.removeprefix("--model-path "),
            layers=self.layers,
            experts=self.experts,
            records=self.records,
            text_T=self.text,
            pictures=self.pictures,
            **arrays,
        )


def routing_of(routed: Sequence[Routed], token_mask: torch.Tensor) -> dict[str, np.ndarray]:
    """What the layers decided, for every place of a batch [B × L]; where a token is padding it means nothing."""
    total, k = token_mask.numel(), max(one.expert_Nk.shape[1] for one in routed)
    expert = np.full((total, len(routed), k), -1, dtype=np.int16)
    gate = np.zeros((total, len(routed), k), dtype=np.float32)
    kept = np.ones((total, len(routed), k), dtype=bool)
    entropy = np.full((total, len(routed)), np.nan, dtype=np.float32)
    for number, one in enumerate(routed):
        rows = np.arange(total) if one.token_N is None else one.token_N.numpy()
        width = one.expert_Nk.shape[1]
        expert[rows, number, :width] = one.expert_Nk.numpy()
        gate[rows, number, :width] = one.gate_Nk.float().numpy()
        if one.kept_Nk is not None:
            kept[rows, number, :width] = one.kept_Nk.numpy()
        if one.entropy_N is not None:
            entropy[rows, number] = one.entropy_N.float().numpy()
    return {"expert_TLk": expert, "gate_TLk": gate, "kept_TLk": kept, "entropy_TL": entropy}


def shown_of(vlm: VLM, media: Sequence[Any], tensors: dict[str, torch.Tensor]) -> Iterator[tuple[Shown, Image.Image]]:
    """What is known of each image or video beside its run, and a small picture of it."""
    reader = vlm.reader
    grids = {name: iter(tensors[f"{name}_grid_thw"].tolist()) for name in MODALITIES if f"{name}_grid_thw" in tensors}
    config = vlm.model.config
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1)
    pixels = tensors.get("pixel_values") if reader.fixed_run is not None else None
    for number, one in enumerate(media):
        modality = "video" if isinstance(one, Video) else "image"
        picture = one.frames[0] if isinstance(one, Video) else one
        frames = None
        if modality in grids:
            times, rows, columns = next(grids[modality])
            frames = int(times), int(rows) // merge, int(columns) // merge
        is_fixed = reader.fixed_run is not None
        tower, tile = tower_shape_of(config) if is_fixed else None, None if is_fixed else tile_of(vlm)
        small = picture.convert("RGB") if pixels is None else seen_by_tower(pixels[number], reader.processor)
        small.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
        yield Shown(picture.size, frames, tower, tile, hasattr(config, "image_grid_pinpoints")), small


MODALITIES = ("image", "video")


def tile_of(vlm: VLM) -> int | None:
    """Tokens of one tile, where images are cut into tiles: the tower's patches where padding is taken off them, else
    what the processor says; None where it does not."""
    vision = getattr(vlm.model.config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if hasattr(vlm.model.config, "image_grid_pinpoints") and isinstance(size, int) and isinstance(patch, int):
        return (size // patch) ** 2
    named = getattr(vlm.processor, "image_seq_length", None)
    return named if isinstance(named, int) else None


def tower_shape_of(config: Any) -> tuple[int, int] | None:
    """Rows and columns of a tower's patches, where its config says them as two numbers that differ; else None: the
    run's own length is a square or it is not."""
    vision = getattr(config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    sides = [value if isinstance(value, list | tuple) else (value, value) for value in (size, patch)]
    if any(value is None for pair in sides for value in pair) or sides[0][0] == sides[0][1]:
        return None
    return sides[0][0] // sides[1][0], sides[0][1] // sides[1][1]


def seen_by_tower(pixels: torch.Tensor, processor: Any) -> Image.Image:
    """The picture that a tower was shown: cropped or padded, and no longer normalised.

    Args:
        pixels: [3, H, W].
    """
    images = processor.image_processor
    mean, std = (torch.tensor(getattr(images, name, None) or [0.5] * 3) for name in ("image_mean", "image_std"))
    if not getattr(images, "do_normalize", True):
        mean, std = torch.zeros(3), torch.ones(3)
    values = (pixels.float().cpu() * std[:, None, None] + mean[:, None, None]).clamp(0, 1)
    return Image.fromarray((values * 255).round().byte().permute(1, 2, 0).numpy())
