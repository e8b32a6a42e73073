# SPDX-License-Identifier: Apache-2.0
"""Where every command that trains comes in: `moellava train`, `python train.py`, `deepspeed --module moellava.train`,
`torchrun -m moellava.train`. What only asks for help is answered before torch is there."""

from __future__ import annotations

from collections.abc import Sequence

from moellava.startup import importing

HELP, HELP_ALL, PRINT_CONFIG = ("--help", "-h"), ("--help_all", "--help-all"), ("--print_config", "--print-config")


def main(argv: Sequence[str]) -> int:
    """Trains one stage, or prints what is asked for. Returns the exit status."""
    words = list(argv)
    if set(HELP) & set(words):
        from moellava.train.help import help_text

        return _say(help_text())
    with importing():
        from moellava.train.help import help_of_all
        from moellava.train.train import main as run
        from moellava.train.train import print_config
    if set(HELP_ALL) & set(words):
        return _say(help_of_all())
    if set(PRINT_CONFIG) & set(words):
        return print_config([word for word in words if word not in PRINT_CONFIG])
    return run(words)


def _say(text: str) -> int:
    from moellava.log import printable

    print(printable(text))  # noqa: T201  (the answer of a command)
    return 0
