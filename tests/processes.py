# SPDX-License-Identifier: Apache-2.0
"""The one harness for real processes: what a user would type, run to its end or killed, with nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from moellava.train.arguments import parse_arguments
from moellava.train.train import train
from tests.prepared import Launched, Server

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = Path(sys.executable).parent  # where this Python's launchers lie

OURS = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
"""The environment that the tests were started in; runs in this process add to it what belongs to them alone."""

Finished = subprocess.CompletedProcess[str]
Flags = dict[str, object]
"""Flags by name; a list stands for several words, and None for a flag that is not given."""


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Inside, this process can write no file longer than `size` bytes, as on a full disk: the system refuses the rest.
    Around a write alone, since pytest's own report may be a longer file."""
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)


def words_of(flags: Flags) -> list[str]:
    """Flags as they are typed."""
    given = [(name, value) for name, value in flags.items() if value is not None]
    several = [(name, value if isinstance(value, (list, tuple)) else [value]) for name, value in given]
    return [str(word) for name, values in several for word in (f"--{name}", *values)]


def train_here(flags: Flags) -> Path:
    """Runs `train.py` in this process; returns the folder that it leaves."""
    return train(*parse_arguments(words_of(flags)))


def train_command(flags: Flags, processes: int = 1, launcher: str = "deepspeed", fresh: bool = False) -> list[str]:
    """The command line of train.py: alone, or in several processes as under `deepspeed` (with ZeRO-2) or `torchrun`."""
    own = [str(ROOT / "train.py"), *words_of(flags)]
    if processes == 1:
        return [sys.executable, *own]
    if launcher == "deepspeed" and "deepspeed" not in flags:
        own += ["--deepspeed", str(ROOT / "scripts" / "zero2.json")]
    return [*launched(processes, launcher, fresh), *own]


def launched(processes: int, launcher: str = "deepspeed", fresh: bool = False) -> list[str]:
    """What is typed in front of a script that several processes run: a real launcher, or one that forks."""
    if not fresh:
        return [sys.executable, "-m", "tests.ranks", "--master_port", str(free_port()), str(processes)]
    count = {"deepspeed": "--num_accelerators", "torchrun": "--nproc-per-node"}[launcher]
    return [str(PROGRAMS / launcher), "--master_port", str(free_port()), count, str(processes)]


def free_port() -> int:
    """A port that nobody listens on, out of those that the system never gives to a connection: it may not be taken
    between now and the launch."""
    while True:
        port = secrets.choice(range(20000, 32000))
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def environment() -> dict[str, str]:
    """This package, no hub, and one thread a process: runs are repeatable to the bit and do not fight for cores."""
    calm = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    calm |= {"PYTHONFAULTHANDLER": "1"}
    path = f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"
    return OURS | calm | {"PATH": path, "PYTHONPATH": str(ROOT)}


def run(words: Sequence[str], timeout: float = 280, fresh: bool = False, **options) -> Finished:
    """Runs a command to its end, at most `timeout` seconds; whatever it has started ends with it.

    One that takes longer fails with the stacks of all its processes.

    Options are those of `Popen`, but `env` is added to `environment()`, and `input` is what the command reads. A Python
    command may start from a prepared process; `fresh` asks for an interpreter that has imported nothing yet.
    """
    said, env = options.pop("input", ""), environment() | options.pop("env", {})
    with start(words, env, said, fresh, **options) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            signal_session(process.pid, signal.SIGABRT)  # Python's fault handler says where each thread stands
            stdout, stderr = process.communicate(timeout=20)
            raise AssertionError(f"{shlex.join(words)} takes over {timeout} s:\n{stderr[-20000:]}") from None
        finally:
            kill_session(process.pid)  # a launcher that is stopped leaves its ranks behind
    assert process.returncode or not shared_memory_of(words)
    assert CRASH not in stderr, f"{shlex.join(words)} crashes:\n{around(stderr, CRASH)}"
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


@cache
def prepared() -> Server:
    """The process that launches are forked from; it starts when it is first asked for."""
    return Server(environment())


def start(
    words: Sequence[str], env: dict[str, str], said: str = "", fresh: bool = False, **options
) -> subprocess.Popen[str] | Launched:
    """The process of a command, which reads `said`, in a session of its own; forked where that is the same."""
    if not fresh and options.keys() <= {"cwd", "stdout"} and prepared().fits(words, env):
        return Launched(prepared(), words, env, said, **options)
    with tempfile.TemporaryFile("w+") as read:
        read.write(said)
        read.seek(0)
        given = {"stdin": read, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "errors": "replace"} | options
        return subprocess.Popen(words, env=env, start_new_session=True, text=True, **given)


def run_python(code: str, *arguments: object, **options) -> str:
    """Runs code in a Python of its own; returns what it prints."""
    done = run([sys.executable, "-c", code, *map(str, arguments)], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_train(
    flags: Flags, processes: int = 1, launcher: str = "deepspeed", fresh: bool = False, **options
) -> Finished:
    """Runs `train.py` to its end, its output as text; `fresh` as a user would. See `run` for the options."""
    return run(train_command(flags, processes, launcher, fresh), fresh=fresh, **options)


def kill_train(flags: Flags, checkpoint: str, processes: int = 1) -> None:
    """Runs `train.py` until a checkpoint of that name appears, then kills every process of it with SIGKILL."""
    wanted, words = Path(str(flags["output_dir"])) / checkpoint, train_command(flags, processes)
    with start(words, environment()) as process:
        try:
            deadline = time.monotonic() + 200
            while not wanted.exists():
                assert process.poll() is None, "the run ended before it could be killed"
                assert time.monotonic() < deadline, f"{wanted} did not appear"
                time.sleep(0.02)
        finally:
            kill_session(process.pid)
    assert not shared_memory_of(words)


def shared_memory_of(words: Sequence[str]) -> list[Path]:
    """What a run has left in shared memory, told by its port; empty for a process that ran alone."""
    port = words[words.index("--master_port") + 1] if "--master_port" in words else "alone"
    return list(Path("/dev/shm").glob(f"*_{port}_*"))


def kill_session(leader: int) -> None:
    """SIGKILLs every process of a session."""
    signal_session(leader, signal.SIGKILL)


def signal_session(leader: int, number: signal.Signals) -> None:
    """Sends a signal to every process of a session: the launcher starts its ranks in groups of their own."""
    for process in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        with suppress(ProcessLookupError):  # it may end by itself meanwhile
            if os.getsid(process) == leader:
                os.kill(process, number)


CRASH = "Fatal Python error"
"""How Python's fault handler begins; no test asks for a crash of the interpreter."""


def around(text: str, mark: str, before: int = 4000, after: int = 12000) -> str:
    """The part of a long text about the first place of a mark."""
    at = text.index(mark)
    return text[max(at - before, 0) : at + after]


WORKER = """
import atexit, json, os, sys, torch, deepspeed
torch.set_num_threads(1)
from moellava.train.deepspeed.extensions import leave_out_shared_memory
leave_out_shared_memory()
deepspeed.init_distributed()
atexit.register(torch.distributed.destroy_process_group)
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
folder, arguments = sys.argv[-1], sys.argv[1:-1]
def report(value):
    json.dump(value, open(f"{folder}/rank{rank}.json", "w"))
"""


def run_ranks(folder: Path, script: str, processes: int, *arguments: object) -> list[object]:
    """Runs a script in a group of processes; returns what each rank has reported.

    Args:
        folder: where the script and the reports go.
        script: calls `report(value)` once per rank with something that JSON holds; `torch`, `deepspeed`, `rank`,
            `world` and `arguments` are there.
    """
    (folder / "worker.py").write_text(WORKER + script)
    words = [*launched(processes), str(folder / "worker.py"), *map(str, arguments), str(folder)]
    done = run(words)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


def stage_command(script: Path, *flags: str, **variables: str) -> list[str]:
    """The command that a stage script would run, as words; of the environment it sees `variables` alone."""
    bare = {"PATH": environment()["PATH"], "HOME": os.environ.get("HOME", "/"), "DRY_RUN": "1"}
    words = ["bash", str(script), *flags]
    return shlex.split(subprocess.run(words, env=bare | variables, capture_output=True, text=True, check=True).stdout)


def losses_of(folder: Path) -> dict[int, float]:
    """step -> logged loss of a run."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
