# SPDX-License-Identifier: Apache-2.0
"""Two hosts: network namespaces of this machine, joined by a wire of their own. One of them dies.

Where namespaces may not be made, the hosts are two addresses of the loopback device.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.processes import ROOT, environment, free_port, words_of


class Host(NamedTuple):
    """Where one half of a run goes.

    Attributes:
        enter: words before a command that is to run there.
        address: of the host.
        device: its network interface.
    """

    enter: list[str]
    address: str
    device: str


def ip(*words: str) -> bool:
    """Runs `ip`; False where it is refused, or is not there."""
    try:
        return subprocess.run(["ip", *words], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Two network namespaces, joined by a veth pair."""
    names = [f"moellava-{os.getpid()}-{number}" for number in (0, 1)]
    wires = [f"ml{os.getpid() % 10**6}{end}" for end in "ab"]
    try:
        joined = all(ip("netns", "add", name) for name in names)
        joined = joined and ip("link", "add", wires[0], "type", "veth", "peer", "name", wires[1])
        for number, (name, wire) in enumerate(zip(names, wires, strict=True), start=1):
            joined = joined and ip("link", "set", wire, "netns", name)
            joined = joined and ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", wire)
            joined = joined and all(ip("-n", name, "link", "set", device, "up") for device in (wire, "lo"))
        if joined:
            spaces = zip(names, wires, (1, 2), strict=True)
            yield [Host(["ip", "netns", "exec", name], f"10.77.0.{number}", wire) for name, wire, number in spaces]
        else:
            yield [Host([], f"127.0.0.{number}", "lo") for number in (1, 2)]
    finally:
        for name in names:
            ip("netns", "delete", name)  # and with it its end of the wire


def start(host: Host, number: int, first: Host, port: int, words: list[str]) -> subprocess.Popen[str]:
    """One host's half of a run of two, as a user would start it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(number)]
    torchrun += ["--nproc-per-node", "1", "--master-addr", first.address, "--master-port", str(port)]
    command = [*host.enter, *torchrun, str(ROOT / "train.py"), *words]
    env = environment() | {"GLOO_SOCKET_IFNAME": host.device, "TEST_HOST": host_name(port, number)}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=env, start_new_session=True, text=True, **pipes)


def host_name(port: int, number: int) -> str:
    """What every process of a host has in its environment."""
    return f"{port}-{number}"


def die(name: str) -> None:
    """Kills every process of a host at once, whichever session or group it is in."""
    mark = f"TEST_HOST={name}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)


def wait_for(path: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Returns once a file is there; fails where a process has ended before, or after two minutes."""
    until = time.monotonic() + 240
    while not path.exists():
        ended = [process for process in processes if process.poll() is not None]
        assert not ended, ended[0].communicate()[1][-3000:]
        assert time.monotonic() < until, f"{path} has not appeared"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_host_dies_and_the_run_goes_on_from_its_checkpoint(tmp_path, flags_for, run_train, losses_of):
    """Two hosts train as two processes of one do; the one that is left says what happened, ends within a minute, and
    goes on alone with the same batch."""
    flags = flags_for(tmp_path, "pretrain") | {"max_steps": 40, "save_steps": 10, "ddp_timeout": 50}
    run = flags | {"output_dir": tmp_path / "hosts"}
    with two_hosts() as hosts:
        port = free_port()
        halves = [start(host, number, hosts[0], port, words_of(run)) for number, host in enumerate(hosts)]
        try:
            wait_for(tmp_path / "hosts" / "checkpoint-10", halves)
            die(host_name(port, 1))
            began = time.monotonic()
            said = halves[0].communicate(timeout=120)[1]
            assert time.monotonic() - began < 60
        finally:
            for number, half in enumerate(halves):
                die(host_name(port, number))
                half.wait()
    assert halves[0].returncode != 0
    assert "Connection closed by peer" in said or "Connection reset by peer" in said, said[-3000:]
    step = max(int(path.name.split("-")[1]) for path in (tmp_path / "hosts").glob("checkpoint-*"))
    assert 10 <= step < 40, "it was killed in between"
    for folder, processes in {"hosts": 1, "one": 2}.items():  # the host that is left, alone; and both, never stopped
        own = {"output_dir": tmp_path / folder, "ddp_timeout": 50 if processes > 1 else None}
        result = run_train(flags | own, processes=processes, launcher="torchrun")
        assert result.returncode == 0, result.stderr[-3000:]
    assert losses_of(tmp_path / "hosts") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-5)
