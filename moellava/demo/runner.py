# SPDX-License-Identifier: Apache-2.0
"""Runs the demo's commands: printed first, logged to a file, not repeated once done, and loud when they fail."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

LINES_OF_A_FAILURE = 40
WORTH_SHOWING = re.compile(
    r"step \d|tower step|LM step|INFO |part  |[a-z_]+ +[\d,]+ +[\d,]+$|  \| "
    r"|  \w+: max \|Δlogit\||  (prompt|answer|reference) "
)
"""What a newcomer sees of a training log: its progress, the table of what trains, the first sample, the certificate,
sample answers. The rest stays in the file."""


class StepFailed(Exception):
    """A command ended with an error; the message shows the end of its log."""


def say(text: str = "") -> None:
    """One line of progress, at once."""
    print(text, flush=True)


def show_file(path: Path) -> None:
    """What a command has written, line by line."""
    for line in path.read_text(encoding="utf-8").splitlines():
        say(f"     {line}")


class Journal:
    """Which steps have begun and finished, in one JSON file.

    A step's stamp is a hash of its settings and of the stamp before it: whatever changes, the steps from there on
    run anew.
    """

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
        self.stamp = ""

    def step(self, name: str, settings: Any, run: Callable[[], None], clear: Callable[[], None]) -> None:
        """Runs a step unless it has finished with these settings; `clear` removes what other settings have left."""
        self.stamp = hashlib.sha256(json.dumps([self.stamp, settings], default=str).encode()).hexdigest()
        entry = self.entries.get(name, {})
        if entry == {"stamp": self.stamp, "finished": True, "seconds": entry.get("seconds")}:
            say(f"   done before, in {entry['seconds']} s")
            return
        if entry.get("stamp") != self.stamp:
            clear()
        self._write(name, {"stamp": self.stamp, "finished": False})
        started = time.monotonic()
        run()
        seconds = round(time.monotonic() - started)
        self._write(name, {"stamp": self.stamp, "finished": True, "seconds": seconds})
        say(f"   done in {seconds} s")

    def _write(self, name: str, entry: dict[str, Any]) -> None:
        self.entries[name] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.with_suffix(".new")
        written.write_text(json.dumps(self.entries, indent=1) + "\n")
        os.replace(written, self.path)


def start(command: list[str], log: Path, threads: int) -> subprocess.Popen:
    """Starts a command; everything it says can be read from its `stdout`."""
    say(f"   $ {shlex.join(command)}")
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a group of its own, so that `stop` reaches what a launcher has started
    )


def stop(process: subprocess.Popen) -> None:
    """Ends a command and everything it has started; one that has ended takes no notice."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def finish(process: subprocess.Popen, log: Path, show: re.Pattern | None) -> str:
    """Waits for a command; writes what it says to `log` and shows the lines that match. Returns all of it.

    Raises:
        StepFailed: it ended with an error.
    """
    lines = []
    try:
        with log.open("w", encoding="utf-8", buffering=1) as file:  # by lines, so that a stopped run leaves its log
            assert process.stdout is not None, "see `start`"
            for line in process.stdout:
                lines.append(line)
                file.write(line)
                if show and show.match(line):
                    say(f"     {line.rstrip()}")
        process.wait()
    finally:
        stop(process)
    if process.returncode != 0:
        end = "".join(lines[-LINES_OF_A_FAILURE:])
        raise StepFailed(f"{end}\nThis command ended with status {process.returncode}; its whole log is {log}")
    return "".join(lines)


def run(command: list[str], log: Path, threads: int, show: re.Pattern | None = WORTH_SHOWING) -> str:
    """Runs one command and returns what it says. Raises StepFailed."""
    return finish(start(command, log, threads), log, show)


def run_side_by_side(commands: dict[Path, list[str]], threads: int) -> dict[Path, str]:
    """Runs several commands at once; log file -> what each says. Raises StepFailed for the first that fails."""
    started = {log: start(command, log, threads) for log, command in commands.items()}
    said = {}
    with ThreadPoolExecutor(len(commands)) as pool:
        waiting = {pool.submit(finish, process, log, None): log for log, process in started.items()}
        try:
            for done in as_completed(waiting):
                said[waiting[done]] = done.result()
        finally:
            for process in started.values():
                stop(process)
    return said
