# SPDX-License-Identifier: Apache-2.0
"""`moellava upcycle`: a dense folder -> a sparse one, with its certificate, without training."""

from __future__ import annotations

import argparse

from moellava.commands.values import amount
from moellava.files import require_new_folder
from moellava.log import printable
from moellava.moe.flags import FlagHelp, add_flags
from moellava.moe.spec import MoESpec, MoESpecFlags, given_options
from moellava.startup import importing

GIGABYTE = 10**9


def main(argv: list[str]) -> int:
    """Runs the command; the certificate goes to stdout and into the new folder."""
    arguments = parse(argv)
    target = require_new_folder(arguments.output_dir, "--output-dir")
    spec = MoESpec.from_preset(arguments.moe_preset, **given_options(arguments))
    with importing():
        from moellava.convert.upcycle_folder import upcycle_folder
        from moellava.model.manifest import read_folder
    source = read_folder(arguments.model_path, "--model-path")
    certificate = upcycle_folder(source, target, spec, int(arguments.shard_size * GIGABYTE))
    certificate.save(target)
    print(printable("\n".join([*certificate.lines(), f"Written to {target}"])))
    certificate.check()
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command's flags: its own, and one for each option of `MoESpec`."""
    parser = argparse.ArgumentParser(prog="moellava upcycle", description=__doc__, formatter_class=FlagHelp)
    add_flags(parser.add_argument_group("options of the sparse model (docs/MOE.md)"), MoESpecFlags)
    parser.add_argument("--model-path", required=True, help="dense folder: of stage 2, released, or published")
    parser.add_argument("--output-dir", required=True, help="the folder to write; it must be new, or empty")
    parser.add_argument("--shard-size", type=amount, default=4.0, help="largest file of the new folder, in GB")
    parser.add_argument(
        "--moe_preset", "--moe-preset", default="today", help="'moe-llava': the original's routing and loss"
    )
    return parser.parse_args(argv)
