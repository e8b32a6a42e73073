"""`moellava merge-lora`: base folder + adapter -> merged folder, with proof that both compute the same."""

from __future__ import annotations

import argparse
from pathlib import Path

from moellava.convert.merge_lora import merge
from moellava.errors import UserError
from moellava.log import printable


def main(argv: list[str] | None = None) -> int:
    """The subcommand."""
    parser = argparse.ArgumentParser(prog="moellava merge-lora", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-path", required=True, help="the folder that the run with --lora_enable started from")
    parser.add_argument("--adapter", required=True, type=Path, help="the adapter/ folder that the run has left")
    parser.add_argument("--output-dir", required=True, type=Path, help="the folder to write")
    parser.add_argument(
        "--trust_remote_code",
        type=lambda word: word.lower() == "true",
        default=False,
        help="True: run the Python code in the model's folder, for families that need it",
    )
    args = parser.parse_args(argv)
    if (args.output_dir / "config.json").exists():
        raise UserError(f"--output-dir {args.output_dir} already holds a model. Choose another folder.")
    titles = {
        "adapter": "the adapter moves logits by",
        "merging": "merging changes them by",
        "folder": "the folder differs by",
    }
    for name, differences in merge(args.model_path, args.adapter, args.output_dir, args.trust_remote_code).items():
        for probe, difference in differences.items():
            print(printable(f"{titles[name]:28} max |Δ| {difference:.3e}  {probe}"))
    print(printable(f"wrote {args.output_dir}"))
    return 0
