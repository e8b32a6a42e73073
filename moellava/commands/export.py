"""`moellava export`: a model in the layout that LLaVA and MoE-LLaVA read."""

from __future__ import annotations

import argparse

from moellava.convert.export.llava import write_published
from moellava.files import require_new_folder
from moellava.log import printable
from moellava.model.families import FAMILIES
from moellava.model.manifest import read_folder
from moellava.vlm import open_vlm


def main(argv: list[str] | None = None) -> int:
    """The subcommand."""
    parser = argparse.ArgumentParser(
        prog="moellava export",
        description="Write a model in the layout of LLaVA and MoE-LLaVA.",
        epilog=f"Families: {', '.join(FAMILIES)}.",
    )
    parser.add_argument("--model-path", required=True, help="a folder of stage 2 or 3")
    parser.add_argument("--output-dir", required=True, help="the folder to write; it must be new, or empty")
    args = parser.parse_args(argv)
    target = require_new_folder(args.output_dir, "--output-dir")
    read_folder(args.model_path, "--model-path").require_start()
    write_published(open_vlm(args.model_path, device="cpu"), target)
    print(printable(f"wrote {target}"))
    return 0
