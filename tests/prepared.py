# SPDX-License-Identifier: Apache-2.0
"""A prepared start: a process that has imported what every run imports, and forks for each launch.

A fresh `python train.py` spends over five CPU seconds on imports before anything happens. What is forked here is a
process like any other (a session of its own, an exit status, signals, a fault handler), but for that time. What may
depend on a fresh interpreter gets one: see `Server.fits`.

    tests    --- words, folder, environment; stdin, stdout, stderr, report --->  server
    server   --- fork --->  keeper  --- fork --->  the launched process
    tests    <--- on the report: its pid, and its status in the end ---  keeper

When the tests end, the server's socket closes and it ends; with the server end its keepers, with a keeper its process.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from moellava.startup import importing

ROOT = Path(__file__).resolve().parents[1]

READ_WHEN_USED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""Environment variables that no import reads. Any other that differs from the server's asks for a fresh start."""

LONGEST = 1 << 17
"""Bytes of a request: it travels in one piece."""


class Server:
    """The tests' end of the server, which starts with an environment."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.environment = dict(env)
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Arrow's allocator would start a thread, and a process with threads must not fork.
        calm = self.environment | {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
        with theirs:
            words = [sys.executable, "-m", "tests.prepared", str(theirs.fileno())]
            options = {"stdin": subprocess.DEVNULL, "stdout": self.said, "stderr": self.said, "start_new_session": True}
            self.process = subprocess.Popen(words, cwd=ROOT, env=calm, pass_fds=[theirs.fileno()], **options)
        atexit.register(self.close)

    def fits(self, words: Sequence[str], env: Mapping[str, str]) -> bool:
        """Whether a process that is forked does what a fresh one would: Python, without options of the interpreter, in
        the environment of the server."""
        if words[0] != sys.executable or (words[1].startswith("-") and words[1] not in ("-c", "-m")):
            return False
        asked = (self.environment.keys() | env.keys()) - READ_WHEN_USED
        return all(self.environment.get(name) == env.get(name) for name in asked)

    def ask(self, request: dict[str, object], files: list[int]) -> None:
        """Sends a request."""
        with suppress(BrokenPipeError, ConnectionResetError):  # who waits for the report is told: see `Launched`
            socket.send_fds(self.requests, [json.dumps(request).encode()], files)

    def complaint(self) -> str:
        """What the server has printed in an error of its own."""
        self.said.seek(0)
        return self.said.read()[-8000:]

    def close(self) -> None:
        """Ends the server, and whatever still runs under it."""
        self.requests.shutdown(socket.SHUT_RDWR)  # a process that was forked from this one may hold the socket, too
        self.requests.close()
        self.process.wait(20)
        self.said.close()


class Launched:
    """A process that the server has forked, with what tests use of `subprocess.Popen`.

    Its standard streams are files: `said` is what it reads, and it waits for no reader. `stdout` may be a descriptor.
    """

    def __init__(
        self,
        server: Server,
        words: Sequence[str],
        env: Mapping[str, str],
        said: str = "",
        cwd: object = None,
        stdout: int | None = None,
    ):
        self.args, self.returncode = list(words), None
        self._streams = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(3)]  # noqa: SIM115
        self._streams[0].write(said)
        self._streams[0].seek(0)
        report, theirs = os.pipe()
        self._report = os.fdopen(report, buffering=1)
        files = [stream.fileno() for stream in self._streams]
        if stdout is not None:
            files[1] = stdout
        request = {"words": self.args[1:], "env": dict(env), "cwd": str(cwd or Path.cwd())}
        server.ask(request, [*files, theirs])
        os.close(theirs)
        pid = self._report.readline()
        assert pid, f"the prepared process has not started {shlex.join(words)}:\n{server.complaint()}"
        self.pid = int(pid)

    def poll(self) -> int | None:
        """The exit status, negative for a signal, or None while it runs."""
        if self.returncode is None and select.select([self._report], [], [], 0)[0]:
            status = self._report.readline()
            self.returncode = int(status) if status else -signal.SIGKILL  # it went along with its keeper
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, in the end. Raises TimeoutExpired."""
        if self.returncode is None and not select.select([self._report], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.poll()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end; what it has printed, and its errors. Raises TimeoutExpired."""
        self.wait(timeout)
        for stream in self._streams[1:]:
            stream.seek(0)
        return self._streams[1].read(), self._streams[2].read()

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        for stream in (*self._streams, self._report):
            stream.close()


def serve(requests: socket.socket) -> Sequence[str]:
    """Forks for each request; returns in the processes that are launched, with the words that each has to run."""
    parent, server = os.getppid(), os.getpid()
    while True:
        if not select.select([requests], [], [], 5)[0]:
            if os.getppid() != parent:  # the tests were killed while another process held their end of the socket
                sys.exit()
            continue
        message, files, *_ = socket.recv_fds(requests, LONGEST, 4)
        if not message:  # the tests have ended
            sys.exit()
        if os.fork() == 0:
            requests.close()
            end_with(server)
            return keep(json.loads(message), files)
        for file in files:
            os.close(file)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def keep(request: dict, files: list[int]) -> Sequence[str]:
    """Tells the pid of a request's process, and its status in the end. Returns in that process."""
    *streams, report = files
    keeper, pid = os.getpid(), os.fork()
    if pid == 0:
        end_with(keeper)
        os.close(report)
        become(request, streams)
        return request["words"]
    for stream in streams:
        os.close(stream)
    with os.fdopen(report, "w", buffering=1) as told, suppress(BrokenPipeError):
        told.write(f"{pid}\n")
        told.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
    os._exit(0)


def end_with(parent: int) -> None:
    """Has the kernel kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def become(request: dict, streams: list[int]) -> None:
    """What `exec` would do: a session, streams, folder and environment."""
    os.setsid()
    for number, (stream, name) in enumerate(zip(streams, ("stdin", "stdout", "stderr"), strict=True)):
        os.dup2(stream, number)
        os.close(stream)
        own = anew(getattr(sys, name), number)
        setattr(sys, name, own)
        setattr(sys, f"__{name}__", own)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    numpy.random.seed()  # Python's own generator does so by itself, and torch's always begins with the same seed


def anew(stream: TextIO, number: int) -> TextIO:
    """A standard stream for what its descriptor is now: a file can seek, a pipe cannot."""
    mode, buffering = ("r", -1) if number == 0 else ("w", 1 if number == 2 else -1)
    return open(number, mode, buffering, encoding=stream.encoding, errors=stream.errors, closefd=False)


def execute(words: Sequence[str]) -> None:
    """What follows `python` on a command line: `-c CODE`, `-m MODULE` or a script, and arguments."""
    first, *rest = words
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif first == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = list(words), str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    with importing():
        import numpy

        import moellava.train.train  # noqa: F401  (and with it torch, transformers, peft, datasets)

    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
    execute(serve(socket.socket(fileno=int(sys.argv[1]))))
