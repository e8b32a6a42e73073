# SPDX-License-Identifier: Apache-2.0
"""`moellava plan`: what a run would take and give on so many devices, before any of them is rented."""

from __future__ import annotations

import argparse
import json

from moellava.commands.given import Idle, refuse_idle
from moellava.commands.values import CommandParser, amount, count
from moellava.log import printable
from moellava.plan.devices import DEVICES, SPEEDS
from moellava.startup import importing

ALIASES = {"--model": "--model_name_or_path", "--data": "--data_path"}


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="moellava plan",
        description=__doc__,
        epilog="All other flags are those of train.py: the run that is planned. --model and --data stand for "
        "--model_name_or_path and --data_path. What they fix (--deepspeed, --fsdp_size, --ep_size, "
        "--activation_checkpointing, --per_device_train_batch_size, --bf16) is not varied. The model's weights need "
        "not be there.",
    )
    parser.add_argument("--gpus", type=count, required=True, help="devices, one process each")
    parser.add_argument("--hbm", type=amount, help="memory of a device in GB (default: the device's)")
    parser.add_argument("--device", default="h100", help=f"{', '.join(DEVICES)} (default: h100)")
    parser.add_argument("--per-host", type=count, default=8, help="devices of a host (default: 8)")
    parser.add_argument("--tokens", type=count, help="positions of a sample, media counted, in place of --data")
    parser.add_argument("--supervised", type=count, help="positions of it that are trained on (default: a quarter)")
    parser.add_argument("--images", type=count, help="images of it (default: 1)")
    for name, unit in zip(SPEEDS, ("10^12 operations a second", "GB/s", "GB/s", "GB/s"), strict=True):
        parser.add_argument(f"--{name}", type=amount, help=f"of a device in {unit} (default: the device's)")
    parser.add_argument("--json", action="store_true", help="print every row as JSON")
    return parser


def main(argv: list[str]) -> int:
    """Prints the plan. Exit status 1 if nothing fits."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    words = [ALIASES.get(name, name) + equals + value for name, equals, value in (w.partition("=") for w in rest)]
    if not any(word.partition("=")[0].replace("-", "_") == "__output_dir" for word in words):
        words += ["--output_dir", "out"]  # which training does not go without
    refuse_idle(parser, without(argv, rest), idle_flags(args))
    with importing():
        from moellava.plan.asking import asked_of, command_of, data_of, device_of, flag_groups, refuse_hosts, said
        from moellava.plan.model import counts_of_experts, model_maker
        from moellava.plan.plan import cheapest, dtype_of, rows_of
        from moellava.plan.report import flags_of
        from moellava.train.parsing import given_flags
    given = given_flags(words)
    device = device_of(args)
    refuse_hosts(args.gpus, args.per_host)
    groups = flag_groups(given, args.tokens, args.gpus, device.is_gpu)
    description, make = model_maker(groups, dtype_of(argparse.Namespace(**given), device))
    data = data_of(args, groups, description)
    asked = asked_of(args, given, groups, device, data, counts_of_experts(make) if args.gpus > 1 else ())
    rows = rows_of(asked, make)
    chosen = cheapest(rows, asked.memory)
    command = None if chosen is None else command_of(asked, flags_of(chosen), words, given)
    if args.json:
        content = {"rows": [row.to_json() for row in rows], "cheapest": chosen and chosen.to_json(), "flags": command}
        print(printable(json.dumps(content, indent=1)))
    else:
        print(printable("\n".join(said(asked, rows, command, given))))
    return 0 if chosen else 1


def without(words: list[str], others: list[str]) -> list[str]:
    """The words that are left when others, in the same order, are taken out."""
    left, waiting = [], list(others)
    for word in words:
        if waiting and word == waiting[0]:
            waiting.pop(0)
        else:
            left.append(word)
    return left


def idle_flags(args: argparse.Namespace) -> list[Idle]:
    """Flags that the others leave nothing to do."""
    return [Idle(("supervised", "images"), not args.tokens, "is read with --tokens alone: --data says it itself")]
