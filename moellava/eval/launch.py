# SPDX-License-Identifier: Apache-2.0
"""Several processes of one command on this machine, without a launcher: what `torchrun` sets, and no more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from moellava.log import get_logger

logger = get_logger(__name__)

SECONDS_BETWEEN_LOOKS = 0.2
PARENT = "MOELLAVA_PARENT"
"""Variable that tells a process which one started it."""


def run_processes(command: Sequence[str], count: int) -> int:
    """Runs a command in so many processes, and returns the exit status: that of the first that fails, or 0.

    They find `RANK`, `LOCAL_RANK` and `WORLD_SIZE`, and share the cores. When one fails, or this process is stopped,
    all end.
    """
    shared = {"WORLD_SIZE": str(count), PARENT: str(os.getpid())}
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    started = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    with stopped_by_signals():
        try:
            while True:
                codes = [process.poll() for process in started]
                failed = [code for code in codes if code]
                if failed or None not in codes:
                    return abs(failed[0]) if failed else 0
                time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            for process in started:
                if process.poll() is None:
                    process.terminate()
            for process in started:
                process.wait()


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Makes SIGTERM raise, as Ctrl-C does, so that what is begun is ended."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave) if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone, also by SIGKILL: a thread looks, every second."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def own_command(argv: Sequence[str]) -> list[str]:
    """`moellava` with some words, by this Python."""
    return [sys.executable, "-m", "moellava.cli", *argv]
