# SPDX-License-Identifier: Apache-2.0
"""`moellava prune`: a sparse folder -> a smaller one, without the experts that carry little."""

from __future__ import annotations

import argparse

from moellava.commands.values import CommandParser, count
from moellava.data.media import MediaFiles
from moellava.data.records import load_records
from moellava.files import require_new_folder
from moellava.log import printable
from moellava.startup import importing


def parser() -> argparse.ArgumentParser:
    """The flags of `moellava prune`."""
    flags = CommandParser(prog="moellava prune", description=__doc__)
    flags.add_argument(
        "--model-path", required=True, help="sparse folder: of stage 3, `moellava upcycle`, or published"
    )
    flags.add_argument("--output-dir", required=True, help="the folder to write; it must be new, or empty")
    flags.add_argument("--data", required=True, nargs="+", help="data files that the experts are measured on")
    flags.add_argument("--image-folder", help="what image paths are relative to")
    flags.add_argument("--records", type=count, default=256, help="so many records of the data (default 256)")
    flags.add_argument("--keep", type=count, required=True, help="experts that stay in each layer")
    flags.add_argument("--merge", action="store_true", help="the others go into those that stay, as a weighed mean")
    return flags


def main(argv: list[str]) -> int:
    """Runs the command; what stays is said for each layer."""
    args = parser().parse_args(argv)
    target = require_new_folder(args.output_dir, "--output-dir")
    records = load_records(args.data)
    with importing():
        from moellava.convert.prune_folder import opened, prune_folder
        from moellava.model.manifest import read_folder
    vlm = opened(read_folder(args.model_path, "--model-path"))
    files = MediaFiles(args.image_folder)
    kept = prune_folder(vlm, target, records, files, args.records, args.keep, args.merge)
    lines = [one.line(layer) for layer, one in kept.items()]
    print(printable("\n".join([*lines, f"Written to {target}. `moellava eval --against` says what the score lost."])))
    return 0
