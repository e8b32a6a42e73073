# SPDX-License-Identifier: Apache-2.0
"""What a picture costs before the tower sees it, beside Pillow's own decoding and resizing.

    python benchmarks/pictures.py --json FILE      # --batch 8: as many pictures a call, as a collator asks for

Files of several formats and sizes are written: smooth shapes with a little noise, which take about the bytes a pixel
that photographs take. For each, five ways take turns, one thread, and the least CPU time of the rounds counts. Freed
memory is kept by the process, as in a run; with --forked, some of it, as data workers do:

* Pillow: the file is decoded, made RGB and resized as often as the processor does it, and nothing else;
* transformers: the same file by Pillow, then the model's image processor, which also cuts, rescales and normalises;
* ours: `open_image`, which also checks the file, its limits and its orientation, and `MediaReader`'s pixels: the same
  numbers as transformers', which is looked at first;
* ours, opening: `open_image` alone;
* ours, kept: the same pixels of a picture that `--cache_pixels` has kept.

Of processors that put a sample's pictures into one row (SmolVLM, Llama 3.2 Vision) every picture is a sample.

Processors that cut a picture of any size into patches run as transformers has them where ours has no shorter way.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    MllamaImageProcessorPil,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
    SmolVLMImageProcessorPil,
)
from transformers.models.mllama.image_processing_pil_mllama import (
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from moellava import heap
from moellava.data.feature_store import FeatureStore
from moellava.data.images import open_image
from moellava.data.known import in_planes, put_together
from moellava.data.nested import stacked, tiles_shown
from moellava.data.plain_pixels import plain_pixels
from moellava.data.tabled import tabled
from moellava.data.tones import tones_of

GOAL = 1.5
"""Most CPU time of ours, as a multiple of Pillow's."""

SIDE = 336

CROP = {"height": SIDE, "width": SIDE}

PROCESSORS = {
    "CLIP, cut": CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=CROP),
    "SigLIP, whole": SiglipImageProcessorPil(size=CROP),
    "LLaVA, padded": LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=CROP, do_pad=True),
    "Qwen2-VL, patches": Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}),
    "SmolVLM, tiles": SmolVLMImageProcessorPil(size={"longest_edge": 4 * 512}, max_image_size={"longest_edge": 512}),
    "Llama 3.2 Vision, tiles": MllamaImageProcessorPil(size={"height": 560, "width": 560}),
}

IN_ROWS = (SmolVLMImageProcessorPil, MllamaImageProcessorPil)
"""Those that take a list of pictures for each sample."""

FILES = {
    "JPEG, 640 × 480": ((640, 480), ".jpg", {"quality": 90}),
    "JPEG, 1920 × 1080": ((1920, 1080), ".jpg", {"quality": 90}),
    "JPEG, 1080 × 1920": ((1080, 1920), ".jpg", {"quality": 90}),
    "PNG, 640 × 480": ((640, 480), ".png", {}),
    "WebP, 640 × 480": ((640, 480), ".webp", {"quality": 85}),
}


def picture(size: tuple[int, int]) -> Image.Image:
    """Waves of colour with some noise."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 9, width), np.linspace(0, 7, height))
    waves = np.stack([np.sin(x + channel) * np.cos(y * channel) for channel in range(1, 4)], -1)
    noise = np.random.default_rng(0).normal(0, 4, waves.shape)
    return Image.fromarray((127 + 100 * waves + noise).clip(0, 255).astype(np.uint8))


def resized_sizes(processor: Any, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Widths and heights to which a processor resizes a picture, one after the other."""
    if not isinstance(processor, SmolVLMImageProcessorPil):
        return [resized_size(processor, size)]
    long, tile = dict(processor.size)["longest_edge"], dict(processor.max_image_size)["longest_edge"]
    large = int(long * size[0] / max(size)), int(long * size[1] / max(size))
    in_tiles = tuple(math.ceil(side / tile) * tile for side in large)
    return [large, *[in_tiles] * (in_tiles != large), (tile, tile)]


def resized_size(processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height to which a processor that does it once resizes a picture."""
    if isinstance(processor, MllamaImageProcessorPil):
        canvas = get_optimal_tiled_canvas(size[1], size[0], processor.max_image_tiles, processor.size["height"])
        high, wide = get_image_size_fit_to_canvas(size[1], size[0], *canvas, processor.size["height"])
        return int(wide), int(high)
    if "longest_edge" in dict(processor.size):
        area = dict(processor.size)
        high, wide = smart_resize(size[1], size[0], 28, area["shortest_edge"], area["longest_edge"])
        return wide, high
    if "shortest_edge" not in {name for name, side in dict(processor.size).items() if side}:
        return SIDE, SIDE
    if getattr(processor, "do_pad", False):
        return SIDE, SIDE
    return int(SIDE * size[0] / min(size)), int(SIDE * size[1] / min(size))


def ways(path: Path, processor: Any, size: tuple[int, int], batch: int) -> dict[str, Callable[[], Any]]:
    """What is timed: of the same picture, as often as a batch has pictures."""
    tones, targets = tones_of(processor), resized_sizes(processor, size)
    fast = tabled(processor)
    arranged = (lambda images: [[one] for one in images]) if isinstance(processor, IN_ROWS) else list
    pixels_of = plain_pixels(processor) or (lambda some: fast(arranged(some), return_tensors="pt")["pixel_values"])
    pixels = pixels_of([open_image(path)])
    tiles = pixels.shape[2] if pixels.ndim == 6 else None
    planes = in_planes(pixels) if tiles is None else tiles_shown(pixels[0]).flatten(0, 1)
    store = FeatureStore(path.parent / f"{path.name} {type(processor).__name__}")
    store.add(1, size, tones.of(planes).flatten(1, 2))
    store.flush()
    store.reopen()

    def opened() -> Image.Image:
        with Image.open(path) as image:
            return image.convert("RGB")

    def shown(one: torch.Tensor) -> torch.Tensor:
        return tones.patches(one.unflatten(1, (3, -1)).numpy())

    def by_pillow() -> Any:
        return [
            functools.reduce(lambda image, target: image.resize(target, processor.resample), targets, opened())
            for _ in range(batch)
        ]

    def by_transformers() -> Any:
        return processor(arranged([opened() for _ in range(batch)]), return_tensors="pt")["pixel_values"]

    def ours() -> Any:
        return pixels_of([open_image(path) for _ in range(batch)])

    def kept() -> Any:
        rows = [store.features(store.place(1)) for _ in range(batch)]
        if pixels.ndim < 5:
            return put_together([shown(one) for one in rows], pixels.ndim)
        made = stacked([[one] for one in rows], 0, shown, tiles)
        return made if tiles is None else made.unflatten(1, (-1, tiles))

    if not torch.equal(by_transformers(), ours()) or not torch.equal(ours(), kept()):
        raise SystemExit(f"{path.name}: pixels differ")
    return {
        "Pillow": by_pillow,
        "transformers": by_transformers,
        "ours": ours,
        "ours, opening": lambda: [open_image(path) for _ in range(batch)],
        "ours, kept": kept,
    }


def timed(work: dict[str, Callable[[], Any]], rounds: int, times: int) -> dict[str, float]:
    """The least CPU milliseconds of each, which take turns."""
    least = dict.fromkeys(work, float("inf"))
    for _ in range(rounds):
        for name, do in work.items():
            began = time.process_time()
            for _ in range(times):
                do()
            least[name] = min(least[name], (time.process_time() - began) / times * 1000)
    return least


def measured(path: Path, name: str, args: argparse.Namespace) -> dict[str, float]:
    """CPU milliseconds of a call, by way of taking it."""
    torch.set_num_threads(1)
    size = Image.open(path).size
    with nullcontext() if args.forked else heap.kept():
        return timed(ways(path, PROCESSORS[name], size, args.batch), args.rounds, args.times)


def main() -> None:
    """Prints milliseconds of CPU time and ratios to Pillow's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--times", type=int, default=10, help="calls a round")
    parser.add_argument("--batch", type=int, default=1, help="pictures a call")
    parser.add_argument("--only", default="", help="files and processors whose names this is part of")
    parser.add_argument("--forked", action="store_true", help="in a process that is forked as a data worker is")
    args = parser.parse_args()
    heap.keep_some_in_forks()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for file, (size, ending, options) in FILES.items():
            path = Path(folder) / f"picture{ending}"
            picture(size).save(path, **options)
            for name in PROCESSORS:
                if args.only not in f"{file}; {name}":
                    continue
                with ProcessPoolExecutor(1, get_context("fork")) if args.forked else nullcontext() as pool:
                    ms = pool.submit(measured, path, name, args).result() if pool else measured(path, name, args)
                ms = {way: value / args.batch for way, value in ms.items()}
                row = {"file": file, "bytes": path.stat().st_size, "processor": name, "ms": ms}
                row["ratio"] = ms["ours"] / ms["Pillow"]
                found.append(row)
                told = ", ".join(f"{way} {value:.2f} ms ({value / ms['Pillow']:.2f})" for way, value in ms.items())
                print(f"{file}; {name}: {told}", flush=True)
    for kind, is_one in (("of one size", True), ("of any size", False)):
        ratios = [row["ratio"] for row in found if bool(plain_pixels(PROCESSORS[row["processor"]])) == is_one]
        if ratios:
            print(f"ours / Pillow: {max(ratios):.2f} at most where pictures are {kind} (goal {GOAL})")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
