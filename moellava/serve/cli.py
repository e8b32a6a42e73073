# SPDX-License-Identifier: Apache-2.0
"""`python -m moellava.serve.cli`: the name that MoE-LLaVA knows `moellava chat` by.

Also `deepspeed moellava/serve/cli.py …`, as its users type it: one process, for all experts of a layer lie in it.
"""

import sys

from moellava import cli
from moellava.errors import UserError
from moellava.log import is_rank_zero
from moellava.startup import importing

with importing():
    from moellava.commands.chat import main
    from moellava.processes import world_size

__all__ = ["main"]

LAUNCHERS_FLAG = "--local_rank"


def without_launcher(argv: list[str]) -> list[str]:
    """The flags without the one that the launcher adds. Raises UserError where it has started several processes."""
    if world_size() > 1:
        raise UserError(
            f"one process answers, but the launcher has started {world_size()}: `deepspeed --num_gpus 1 …`, or plain "
            "`python -m moellava.serve.cli …`"
        )
    return [word for word in argv if not word.startswith(f"{LAUNCHERS_FLAG}=")]


if __name__ == "__main__":
    try:
        words = without_launcher(sys.argv[1:])
    except UserError as mistake:
        sys.exit(f"moellava chat: {mistake}" if is_rank_zero() else 1)
    sys.exit(cli.main(["chat", *words]))
