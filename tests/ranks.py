# SPDX-License-Identifier: Apache-2.0
"""A launcher that forks its ranks: `python -m tests.ranks --master_port PORT COUNT SCRIPT …`.

It tells them what `torchrun` tells its own; from a prepared process (see `prepared.py`) they start at once. The real
launchers are tested by the runs that ask for a fresh start.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import numpy

from tests.prepared import execute


def fork_ranks(port: str, count: int) -> None:
    """Returns in each rank; in the launcher it ends the process, with the status of the first rank that failed."""
    ranks = set()
    for rank in range(count):
        if (pid := os.fork()) == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ |= {name: str(value) for name, value in place.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            numpy.random.seed()
            return
        ranks.add(pid)
    sys.exit(end_of(ranks))


def end_of(ranks: set[int]) -> int:
    """Waits for all; the first that fails ends the others. 0, or 1 if one has failed."""
    failed = False
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status and not failed:
            failed = True
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    return int(failed)


def main(words: Sequence[str]) -> None:
    _, port, count, *script = words
    fork_ranks(port, int(count))
    execute(script)


if __name__ == "__main__":
    main(sys.argv[1:])
