# SPDX-License-Identifier: Apache-2.0
"""`moellava recipe`: the hyper-parameters of LLaVA-1.5 and MoE-LLaVA for a language model, as a run file to edit.

moellava recipe                            what there is
moellava recipe qwen3 pretrain             writes qwen3-pretrain.yaml
moellava recipe qwen3 pretrain --print     shows it
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moellava.commands.given import Idle, refuse_idle
from moellava.commands.values import CommandParser
from moellava.errors import UserError
from moellava.files import require_output
from moellava.log import printable
from moellava.recipes import BASES, STAGES, flags_of
from moellava.train.run_file import as_yaml

HEAD = """# {about}
# {stage}.
# moellava train {name}                                 # one process
# deepspeed --module moellava.train {name}              # every GPU of this machine
"""


def text_of(base: str, stage: str, name: str) -> str:
    """A recipe as a run file of that name. Raises UnknownNameError for one that there is not."""
    flags = flags_of(base, stage)
    head = HEAD.format(about=BASES[base].about, stage=STAGES[stage].capitalize(), name=name)
    return head + as_yaml(flags)


def listed() -> str:
    """What there is, one a line."""
    bases = [f"  {name:12} {base.model:40} {base.about}" for name, base in BASES.items()]
    stages = [f"  {name:12} {about}" for name, about in STAGES.items()]
    return "\n".join(["language models:", *bases, "", "stages, in this order:", *stages])


def make_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = CommandParser(
        prog="moellava recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", nargs="?", help=f"language model: {', '.join(BASES)}")
    parser.add_argument("stage", nargs="?", help=", ".join(STAGES))
    parser.add_argument("--print", action="store_true", help="show the file, and write none")
    parser.add_argument("--output", help="the file to write; it must not exist (default: BASE-STAGE.yaml)")
    return parser


def main(argv: list[str]) -> int:
    """The subcommand."""
    parser = make_parser()
    args = parser.parse_args(argv)
    idle = [Idle(["print", "output"], args.stage is None, "is about one recipe: name a language model and a stage")]
    refuse_idle(parser, argv, [*idle, Idle(["output"], args.print, "--print writes no file")])
    if args.base is not None and args.stage is None:
        raise UserError(f"{BASES[args.base].model}: which stage? One of {', '.join(STAGES)}.")
    if args.base is None:
        print(printable(listed()))
        return 0
    path = args.output or f"{args.base}-{args.stage}.yaml"
    text = text_of(args.base, args.stage, path)
    if args.print:
        print(printable(text), end="")
        return 0
    if Path(require_output(path, "--output")).exists():
        raise UserError(f"--output {path} exists: it may have been edited. Name another file, or remove it.")
    Path(path).write_text(text, encoding="utf-8")
    print(printable(f"{path}: edit it, then `moellava train {path}`; docs/TRAIN.md: on several GPUs"))
    return 0
