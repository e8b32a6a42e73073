# SPDX-License-Identifier: Apache-2.0
"""`moellava compare`: was the MoE worth it? Stage 3 and dense controls from one stage-2 folder, scored alike.

    moellava compare --stage2 DIR --data FILE --task easy-vqa --output-dir OUT -- --num_experts 4 --learning_rate 2e-5 …

What stands behind `--` is for train.py: flags of a sparse model for the MoE alone, all others for every arm.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moellava.commands.given import Idle, refuse_idle
from moellava.commands.values import CommandParser, count
from moellava.compare.arms import ARMS, in_order, split_flags, variants
from moellava.errors import UserError
from moellava.eval.layout import DATA_FOLDER
from moellava.files import require_output, write_json
from moellava.log import printable
from moellava.startup import importing

ALL = [name for name in ARMS if name != "lora"]
RESULT, TABLE, PICTURE = "compare.json", "compare.txt", "compare.png"


def parser() -> argparse.ArgumentParser:
    """The flags of `moellava compare`."""
    first, _, rest = (__doc__ or "").partition("\n\n")
    flags = CommandParser(
        prog="moellava compare",
        description=first,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="moellava compare --stage2 DIR --data FILE --output-dir DIR [flags] [-- flags of train.py]",
    )
    flags.add_argument("--stage2", required=True, help="dense folder that all arms start from")
    flags.add_argument("--data", required=True, nargs="+", help="data files that all arms train on")
    flags.add_argument("--output-dir", required=True, type=Path, help="folder for runs, answers, table and picture")
    flags.add_argument("--arms", nargs="+", default=ALL, help=f"some of {', '.join(ARMS)} (default: all but lora)")
    flags.add_argument(
        "--variant",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "ARM", "FLAGS"),
        help="a further arm: one of these with other flags, as in: --variant noise moe '--init noise'",
    )
    flags.add_argument("--seeds", nargs="+", type=int, default=[0], help="each arm is trained once with each (0)")
    flags.add_argument("--task", default="easy-vqa", help="what is asked; `moellava eval --help` lists them")
    flags.add_argument(
        "--data-folder", type=Path, default=Path(DATA_FOLDER), help=f"where the tasks' folders lie ({DATA_FOLDER})"
    )
    flags.add_argument("--limit", type=count, help="ask only so many questions, drawn at random (default: all)")
    flags.add_argument("--batch-size", type=count, default=256, help="questions answered at once (default 256)")
    flags.add_argument(
        "--moe-run",
        type=Path,
        nargs="+",
        default=[],
        help="finished stage-3 runs of the same flags for the first of the seeds, in place of training them",
    )
    flags.add_argument(
        "--launcher", help="in place of `python`: 'deepspeed --num_accelerators 2', 'torchrun --nproc-per-node 2'"
    )
    return flags


def main(argv: list[str]) -> int:
    """Runs the command; started again, it goes on where it was stopped."""
    own, words = split_at_dashes(argv)
    flags = parser()
    args = flags.parse_args(own)
    refuse_idle(flags, own, [Idle(["data_folder"], args.task == "easy-vqa", "is read by tasks other than easy-vqa")])
    output = args.output_dir
    output.mkdir(parents=True, exist_ok=True)
    require_output(output / RESULT, "--output-dir")
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: each once.")
    if len(args.moe_run) > len(args.seeds):
        raise UserError(f"--moe-run names {len(args.moe_run)} runs, and --seeds has {len(args.seeds)}: one run a seed.")
    shared, sparse = split_flags(words)
    arms = in_order(args.arms) | variants(args.variant)
    with importing():
        from moellava.compare.compare import Comparing, Plan
        from moellava.compare.picture import draw
        from moellava.compare.runs import launcher_of
        from moellava.compare.scores import Exam
    plan = Plan(
        args.stage2, args.data, output, arms, args.seeds, shared, sparse, launcher_of(args.launcher), args.moe_run
    )
    found = Comparing(plan, Exam.of(args.task, args.data_folder, args.limit, output / "answers", args.batch_size)).run()
    text = "\n".join(found.lines())
    write_json(output / RESULT, found.to_json())
    (output / TABLE).write_text(text + "\n", encoding="utf-8")
    draw(found, output / PICTURE)
    print(printable(f"{text}\n\nWritten: {', '.join(str(output / name) for name in (RESULT, TABLE, PICTURE))}"))
    return 0


def split_at_dashes(argv: list[str]) -> tuple[list[str], list[str]]:
    """Words before `--`, and words behind it."""
    place = argv.index("--") if "--" in argv else len(argv)
    return argv[:place], argv[place + 1 :]
