"""`moellava export`: a model in the layout that LLaVA and MoE-LLaVA read."""

from __future__ import annotations

import argparse
from pathlib import Path

from moellava.convert.export import write_published
from moellava.errors import UserError
from moellava.model.builder import load_pretrained_model
from moellava.model.families import FAMILIES


def main(argv: list[str] | None = None) -> int:
    """The subcommand."""
    parser = argparse.ArgumentParser(
        prog="moellava export",
        description="Write a model in the layout of LLaVA and MoE-LLaVA.",
        epilog=f"Families: {', '.join(FAMILIES)}.",
    )
    parser.add_argument("--model-path", required=True, help="a folder of stage 2 or 3")
    parser.add_argument("--output-dir", required=True, type=Path, help="the folder to write")
    args = parser.parse_args(argv)
    if (args.output_dir / "config.json").exists():
        raise UserError(f"--output-dir {args.output_dir} already holds a model. Choose another folder.")
    tokenizer, model, _, _ = load_pretrained_model(args.model_path, device="cpu")
    write_published(model, tokenizer, args.output_dir)
    print(f"wrote {args.output_dir}")
    return 0
