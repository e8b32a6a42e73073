# SPDX-License-Identifier: Apache-2.0
"""`moellava merge-lora`: base folder + adapter -> merged folder, with proof that both compute the same."""

from __future__ import annotations

from pathlib import Path

from moellava.commands.values import CommandParser, truth
from moellava.files import require_new_folder
from moellava.log import printable
from moellava.startup import importing


def main(argv: list[str] | None = None) -> int:
    """The subcommand."""
    parser = CommandParser(prog="moellava merge-lora", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-path", required=True, help="the folder that the run with --lora_enable started from")
    parser.add_argument("--adapter", required=True, type=Path, help="the adapter/ folder that the run has left")
    parser.add_argument("--output-dir", required=True, help="the folder to write; it must be new, or empty")
    parser.add_argument(
        "--trust_remote_code",
        type=truth,
        default=False,
        help="True: run the Python code in the model's folder, for families that need it",
    )
    args = parser.parse_args(argv)
    target = require_new_folder(args.output_dir, "--output-dir")
    with importing():
        from moellava.convert.merge_lora import merge
    titles = {
        "adapter": "the adapter moves logits by",
        "merging": "merging changes them by",
        "folder": "the folder differs by",
    }
    for name, differences in merge(args.model_path, args.adapter, target, args.trust_remote_code).items():
        for probe, difference in differences.items():
            print(printable(f"{titles[name]:28} max |Δ| {difference:.3e}  {probe}"))
    print(printable(f"wrote {target}"))
    return 0
