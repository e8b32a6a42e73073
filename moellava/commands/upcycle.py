# SPDX-License-Identifier: Apache-2.0
"""`moellava upcycle`: a dense folder -> a sparse one, with its certificate, without training."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from moellava.commands.given import Idle, refuse_idle
from moellava.commands.values import CommandParser, amount, count
from moellava.errors import UserError
from moellava.files import require_new_folder
from moellava.log import printable
from moellava.moe.flags import FlagHelp, add_flags
from moellava.moe.spec import MoESpec, MoESpecFlags, given_options
from moellava.startup import importing

if TYPE_CHECKING:
    from moellava.convert.mix_folder import MixCertificate
    from moellava.moe.certificate import Certificate

GIGABYTE = 10**9


def main(argv: list[str]) -> int:
    """Runs the command; the certificate goes to stdout and into the new folder."""
    arguments = parse(argv)
    target = require_new_folder(arguments.output_dir, "--output-dir")
    options = given_options(arguments)
    if arguments.sources:
        options = {"num_experts": [len(arguments.sources)], **options}
    spec = MoESpec.from_preset(arguments.moe_preset, **options)
    with importing():
        from moellava.convert.mix_folder import mix_folders
        from moellava.convert.upcycle_folder import upcycle_folder
        from moellava.data.media import MediaFiles
        from moellava.model.manifest import read_folder
    certificate: Certificate | MixCertificate
    if arguments.sources:
        files, records = MediaFiles(arguments.image_folder), arguments.records
        certificate = mix_folders(arguments.sources, target, spec, arguments.data, files, records)
    else:
        source = read_folder(arguments.model_path, "--model-path")
        certificate = upcycle_folder(source, target, spec, int(arguments.shard_size * GIGABYTE))
    print(printable("\n".join([*certificate.lines(), f"Written to {target}"])))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command's flags: its own, and one for each option of `MoESpec`."""
    parser = CommandParser(prog="moellava upcycle", description=__doc__, formatter_class=FlagHelp)
    add_flags(parser.add_argument_group("options of the sparse model (docs/MOE.md)"), MoESpecFlags)
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument("--model-path", help="dense folder: of stage 2, released, or published")
    sources.add_argument(
        "--from",
        dest="sources",
        nargs="+",
        metavar="FOLDER",
        help="dense fine-tunes of one model: each becomes an expert; what is no expert is their mean",
    )
    parser.add_argument("--data", nargs="+", default=[], help="--from: a data file of each source, to start routers")
    parser.add_argument("--image-folder", help="--data: what image paths are relative to")
    parser.add_argument("--records", type=count, default=64, help="--data: records of each file (default 64)")
    parser.add_argument("--output-dir", required=True, help="the folder to write; it must be new, or empty")
    parser.add_argument("--shard-size", type=amount, default=4.0, help="largest file of the new folder, in GB")
    parser.add_argument(
        "--moe_preset", "--moe-preset", default="today", help="'moe-llava': the original's routing and loss"
    )
    arguments = parser.parse_args(argv)
    if arguments.sources and len(arguments.sources) < 2:
        raise UserError(f"--from {arguments.sources[0]}: a mixture needs at least two sources.")
    alone, without = "is read with --from alone", "is read with --data alone"
    refuse_idle(
        parser,
        argv,
        [
            Idle(["data"], not arguments.sources, alone),
            Idle(["image_folder", "records"], not arguments.data, without),
            Idle(["shard_size"], bool(arguments.sources), "is for --model-path: a mixture is written as a stage is"),
        ],
    )
    return arguments
