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

from tests.older import SHARDS
from tests.processes import ROOT, environment, free_port, kill_session, train_here, words_of
from tests.train.test_fsdp import start_of_sparse


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


@SHARDS
@pytest.mark.slow
def test_two_hosts_hold_one_model_in_pieces(tmp_path, flags_for, tokenizer_folder, losses_of):
    """Weights are gathered, and rows travel to experts, over the wire: the numbers of one process."""
    flags = flags_for(tmp_path, "finetune") | {"max_steps": 3, "save_strategy": "no", "router_aux_loss_coef": 0.01}
    flags |= start_of_sparse(tokenizer_folder, tmp_path)
    own = {"fsdp_size": 2, "ep_size": 2, "per_device_train_batch_size": 4, "output_dir": tmp_path / "hosts"}
    with two_hosts() as hosts:
        port = free_port()
        halves = [start(host, number, hosts[0], port, words_of(flags | own)) for number, host in enumerate(hosts)]
        try:
            said = [half.communicate(timeout=240)[1] for half in halves]
        finally:
            for number, half in enumerate(halves):
                die(host_name(port, number))
                half.wait()
    assert [half.returncode for half in halves] == [0, 0], said
    whole = train_here(flags | {"output_dir": tmp_path / "one", "per_device_train_batch_size": 8})
    assert losses_of(tmp_path / "hosts") == pytest.approx(losses_of(whole), abs=1e-5)


REMOTE = """#!/bin/bash
# `ssh HOST COMMAND` and `pdsh … -w HOSTS COMMAND`, by namespaces; a host has an environment of its own.
while [[ $1 == -* ]]; do
  case $1 in -w) hosts=${2//,/ }; shift 2 ;; -o | -f) shift 2 ;; *) shift ;; esac
done
[ -n "$hosts" ] || { hosts=$1; shift; }
number=0
for host in $hosts; do
  . "${0%/*}/$host"
  own=(env -i PATH="$PATH" HOME=/nowhere TEST_HOST="$NAME" GLOO_SOCKET_IFNAME="$DEVICE" RES_OPTIONS="$RES_OPTIONS")
  "${own[@]}" $ENTER bash -c "${*//%n/$number}" & started+=($!)
  number=$((number + 1))
done
for one in "${started[@]}"; do wait "$one" || exit $?; done
"""
"""What stands for both programs: no package of Debian's, and no key, is needed."""


def write_cluster(folder: Path, hosts: list[Host], port: int) -> dict[str, str]:
    """Programs that reach the hosts, and a hostfile; the environment of who starts a run from the first of them."""
    for number, (name, host) in enumerate(zip(NAMES, hosts, strict=True)):
        facts = {"ENTER": " ".join(host.enter), "DEVICE": host.device, "NAME": host_name(port, number)}
        (folder / name).write_text("".join(f"{key}='{value}'\n" for key, value in facts.items()))
    for program in ("ssh", "pdsh"):
        (folder / program).write_text(REMOTE)
        (folder / program).chmod(0o755)
    (folder / "hosts").write_text("".join(f"{name} slots=1\n" for name in NAMES))
    env = environment()
    passed = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "TORCH_EXTENSIONS_DIR")
    (folder / ".deepspeed_env").write_text("\n".join(f"{name}={env[name]}" for name in passed if name in env))
    env |= {"RES_OPTIONS": "attempts:1 timeout:1"}  # torch asks for the names of addresses; no server answers there
    return env | {"PATH": f"{folder}{os.pathsep}{env['PATH']}", "MASTER": f"{hosts[0].address}:{port}"}


NAMES = ("node1", "node2")


@pytest.mark.slow
def test_a_hostfile_starts_a_run_on_two_hosts_over_ssh_and_without(tmp_path, flags_for, losses_of):
    """Started over ssh, killed on both; started anew on each host by itself: the numbers of one process."""
    flags = flags_for(tmp_path, "pretrain") | {"skip_dry_save": True, "lr_scheduler_type": "cosine"}
    own = words_of(flags | {"output_dir": tmp_path / "run", "deepspeed": "zero2"})
    script = ["bash", str(ROOT / "scripts" / "cluster" / "hostfile.sh"), "hosts", *own]
    pipes = {"cwd": tmp_path, "text": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with two_hosts() as hosts:
        port = free_port()
        env = write_cluster(tmp_path, hosts, port)
        over_ssh = subprocess.Popen([*hosts[0].enter, *script], env=env, start_new_session=True, **pipes)
        try:
            wait_for(tmp_path / "run" / "checkpoint-2", [over_ssh])
        finally:
            kill_session(over_ssh.pid)
            for number in (0, 1):
                die(host_name(port, number))
        again = [
            subprocess.Popen(
                [*host.enter, *script], start_new_session=True,
                env=env | {"NODE": str(number), "GLOO_SOCKET_IFNAME": host.device}, **pipes,
            )
            for number, host in enumerate(hosts)
        ]  # fmt: skip
        try:
            ended = [one.communicate(timeout=240)[1] for one in again]
        finally:
            for one in again:
                kill_session(one.pid)
    assert [one.returncode for one in again] == [0, 0], ended
    assert "Going on from" in ended[0]
    whole = train_here(flags | {"output_dir": tmp_path / "one", "per_device_train_batch_size": 4})
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(whole), abs=1e-5)
