# SPDX-License-Identifier: Apache-2.0
"""`moellava convert-data`: data files of any format -> LLaVA JSON Lines."""

from __future__ import annotations

import argparse

from moellava.commands.records import DATA_HELP, add_role_flags, roles_of
from moellava.commands.values import CommandParser
from moellava.data.rewrite import rewrite
from moellava.data.skip_lists import read_skip_list
from moellava.log import printable


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="moellava convert-data", description=__doc__)
    parser.add_argument("data", nargs="+", help=DATA_HELP)
    parser.add_argument("--output", required=True, metavar="OUT.jsonl", help="the file to write; it must not exist")
    parser.add_argument(
        "--image-folder", help="write images and videos that records hold themselves to this folder, as files"
    )
    parser.add_argument("--skip-list", "--skip_list", help="records to leave out, as check-data has written them")
    add_role_flags(parser)
    return parser


def main(argv: list[str]) -> int:
    """Writes the file and prints counts. All that is wrong with the data is told at once, and nothing is written."""
    args = _parser().parse_args(argv)
    skip = read_skip_list(args.skip_list) if args.skip_list else None
    counts = rewrite(args.data, args.output, args.image_folder, skip, roles_of(args))
    if skip is not None:
        skip.require_used()
    listed = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
    print(printable(f"{args.output}: {listed}"))
    return 0
