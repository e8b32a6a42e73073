# SPDX-License-Identifier: Apache-2.0
"""`moellava export`: a model as a folder that opens without moellava, with its proof."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moellava.commands.given import Idle, refuse_idle
from moellava.commands.values import CommandParser, amount, truth
from moellava.convert.export import AUTO, CODE, LLAVA, NATIVE
from moellava.files import CONFIG, read_object, require_new_folder
from moellava.log import printable
from moellava.startup import importing

GIGABYTE = 10**9


def make_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = CommandParser(
        prog="moellava export",
        description="Write a model as a folder that opens without moellava, and prove it (docs/EXPORT.md).",
    )
    parser.add_argument(
        "--model-path", required=True, help="any folder that opens: of stage 2 or 3, released, published"
    )
    parser.add_argument("--output-dir", required=True, help="the folder to write; it must be new, or empty")
    parser.add_argument(
        "--to",
        default=AUTO,
        help="native: one of Hugging Face's own classes, the first that is exact, or one by its name (docs/EXPORT.md); "
        "code: its dense class with one file of modelling code; auto: native where there is one, else code; llava: the "
        "layout of LLaVA and MoE-LLaVA (default: auto)",
    )
    parser.add_argument(
        "--verify",
        type=truth,
        default=True,
        help="True: reopen the new folder in plain transformers, compare logits and greedy tokens, and write "
        "nothing if they differ",
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        help="the adapter/ of a run with --lora_enable that started from --model-path: write the model that it stands "
        "on, and in adapter/ the adapter for peft and engines (the run's own folder is merged, and exports as any)",
    )
    parser.add_argument(
        "--dropless",
        type=truth,
        default=False,
        help="True: a model whose experts drop tokens beyond their capacity is written as what it is without drops, "
        "since no engine drops; it is refused else",
    )
    parser.add_argument("--shard-size", type=amount, default=4.0, help="largest file of the new folder, in GB")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The subcommand. What computes something else, or does not open, ends with status 1, and is gone again."""
    parser = make_parser()
    args = parser.parse_args(argv)
    why = "the layout of LLaVA opens in LLaVA's code alone, in one file: leave the flag out"
    idle = [Idle(("verify", "shard_size", "adapter", "dropless"), args.to == LLAVA, why)]
    idle.append(Idle(("verify",), args.adapter, "an adapter is always compared: leave the flag out"))
    refuse_idle(parser, argv, idle)
    with importing():
        from moellava.convert.export.adapter import export_adapter
        from moellava.convert.export.export_folder import export_folder
        from moellava.convert.export.llava import write_published
        from moellava.convert.export.page import engine_lines
        from moellava.convert.export.proof import NotProvenError
        from moellava.convert.export.targets import TARGETS
        from moellava.convert.verify import FAILED
        from moellava.model.manifest import read_folder
        from moellava.vlm import open_vlm
    if args.to not in (AUTO, NATIVE, CODE, LLAVA):
        TARGETS[args.to]  # an unknown name is told with the known ones
    target = require_new_folder(args.output_dir, "--output-dir")
    manifest = read_folder(args.model_path, "--model-path")
    shard_bytes, proofs = int(args.shard_size * GIGABYTE), []
    try:
        if args.to == LLAVA:
            manifest.require_start()
            write_published(open_vlm(args.model_path, device="cpu"), target)
        elif args.adapter:
            proofs = [*export_adapter(manifest, args.adapter, target, args.to, shard_bytes, args.dropless)]
        else:
            certificate = export_folder(manifest, target, args.to, args.verify, shard_bytes, args.dropless)
            proofs = [] if certificate is None else [certificate]
    except NotProvenError as error:
        print(printable(f"moellava export: {error}"), file=sys.stderr)
        return FAILED
    said = [line for proof in proofs for line in proof.lines()]
    if args.to != LLAVA:
        said += [f"served by: {line}" for line in engine_lines(read_object(target / CONFIG), target)]
    print(printable("\n".join([*said, f"wrote {target}"])))
    return 0
