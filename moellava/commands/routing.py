# SPDX-License-Identifier: Apache-2.0
"""`moellava routing`: which expert each token of some records goes to, as numbers, pictures and one page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from moellava.commands.records import DATA_HELP, add_confine_flag, add_limit_flags, add_role_flags, limits_of, roles_of
from moellava.commands.values import CommandParser, count
from moellava.data.media import NUM_FRAMES, MediaFiles, require_frames
from moellava.data.records import load_records
from moellava.files import require_new_folder
from moellava.log import printable
from moellava.startup import importing
from moellava.vis.needed import require_packages

if TYPE_CHECKING:
    from moellava.vis.collect import Collected
    from moellava.vis.measures import Summary

SAMPLES, PICTURES, BATCH = 64, 4, 4


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="moellava routing", description=__doc__)
    parser.add_argument("--model-path", required=True, help="folder or hub id of a sparse vision-language model")
    parser.add_argument("--data", nargs="+", required=True, help=DATA_HELP)
    parser.add_argument("--output", required=True, help="folder for the files; it must be new, or empty")
    parser.add_argument("--image-folder", help="what the image paths in the records are relative to")
    parser.add_argument("--video-folder", help="what the video paths are relative to (default: --image-folder)")
    parser.add_argument("--limit", type=count, default=SAMPLES, help=f"samples, spread over the data ({SAMPLES})")
    parser.add_argument("--pictures", type=count, default=PICTURES, help=f"pictures that get a map ({PICTURES})")
    parser.add_argument("--batch-size", type=count, default=BATCH, help=f"samples that run together ({BATCH})")
    parser.add_argument("--max-length", type=count, help="positions; longer samples are cut (default: the context)")
    parser.add_argument("--num-frames", type=int, default=NUM_FRAMES, help=f"images of a video (default: {NUM_FRAMES})")
    parser.add_argument("--version", help="template (default: the model's)")
    add_role_flags(parser)
    add_confine_flag(parser)
    add_limit_flags(parser)
    return parser


def main(argv: list[str]) -> int:
    """Runs the command. What cannot be met is a UserError before the data is read."""
    args = _parser().parse_args(argv)
    require_packages("moellava routing")
    require_frames(args.num_frames, "--num-frames")
    output = require_new_folder(args.output, "--output")
    records = load_records(args.data, roles=roles_of(args))
    with importing():
        from moellava.batches import spread
        from moellava.data.dataset import SupervisedDataset
        from moellava.moe.watch import require_experts
        from moellava.vis.collect import collect
        from moellava.vlm import open_vlm
    records = records.picked(spread(len(records), args.limit))
    vlm = open_vlm(args.model_path, version=args.version)
    require_experts(vlm.model, vlm.source)
    files = MediaFiles(args.image_folder, args.video_folder, args.num_frames, limits_of(args), args.confine_media)
    length = min(args.max_length or vlm.context_length, vlm.context_length)
    dataset = SupervisedDataset(records, vlm.encoder, files, max_length=length, overlong="truncate")
    seen = collect(vlm, dataset, args.limit, args.batch_size)
    for line in write(output, seen, args.pictures):
        print(printable(line))
    return 0


def write(output: Path, seen: Collected, pictures: int) -> list[str]:
    """Writes tables, figures and the page; returns what is said about them."""
    from moellava.vis.figures import write_figures
    from moellava.vis.measures import summarise
    from moellava.vis.page import write_page
    from moellava.vis.routing_page import routing_page
    from moellava.vis.tables import columns_of, write_tables

    output.mkdir(parents=True, exist_ok=True)
    summary = summarise(seen)
    paths = [
        *write_tables(output, columns_of(seen, summary)),
        *write_figures(output, seen, summary, pictures),
        write_page(output / "routing.html", routing_page(seen, summary, pictures)),
    ]
    return [*said(seen, summary), f"Written to {output}: {', '.join(path.name for path in paths)}"]


def said(seen: Collected, summary: Summary) -> list[str]:
    """A few lines for the terminal."""
    parts = ", ".join(f"{summary.tokens[name]:,} of {name}" for name in ("image", "text"))
    lines = [f"{summary.tokens['all']:,} tokens of {len(seen.records)} samples ({parts}) in {len(seen.layers)} layers"]
    loads = list(zip(seen.layers, summary.load["all"], strict=True))
    layer, load = max(loads, key=lambda pair: pair[1].max() * len(pair[1]))
    dead = sum(int((row == 0).sum()) for _, row in loads)
    lines.append(
        f"most uneven: layer {layer}, load {100 * load.min():.1f}-{100 * load.max():.1f}%; {dead} dead experts"
    )
    bits = summary.information["modality"]
    best = max(range(len(bits)), key=bits.__getitem__)
    bound = summary.bound["modality"]
    if bound:
        lines.append(f"image or text: layer {seen.layers[best]} tells most of it, {bits[best]:.2f} of {bound:.2f} bits")
    no_grid = sum(not picture.grids for picture in seen.pictures)
    if no_grid:
        lines.append(f"{no_grid} of {len(seen.pictures)} pictures have tokens that are no grid, and get no map")
    return lines
