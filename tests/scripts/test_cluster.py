# SPDX-License-Identifier: Apache-2.0
"""`scripts/cluster/` with stand-ins for Slurm and the launchers: what they start, and what becomes of a stop."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "scripts" / "cluster"

SRUN = """#!/bin/bash
said="srun $*"
while [[ $1 == --* ]]; do shift; done
trap 'kill -TERM "${children[@]}"' TERM
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 "$@" & children+=($!); done
echo "$said" >> "$LOG"
status=0
for child in "${children[@]}"; do
  wait $child; code=$?
  while kill -0 $child 2>/dev/null; do wait $child; code=$?; done
  ((code > status)) && status=$code
done
exit $status
"""
"""Starts two tasks, hands SIGTERM on to them, and ends with the largest of their statuses."""

SCONTROL = """#!/bin/bash
[ "$1" = show ] && printf 'node1\\nnode2\\n' || echo "scontrol $*" >> "$LOG"
"""

PYTHON = """#!/bin/bash
[ "$WAITS" ] && trap 'echo "saved by $RANK" >> "$LOG"; exit 143' TERM
echo "rank $RANK/$WORLD_SIZE local $LOCAL_RANK at $MASTER_ADDR:$MASTER_PORT: $*" >> "$LOG"
[ "$WAITS" ] || exit ${STATUS:-0}
for _ in $(seq 200); do sleep 0.05; done
"""
"""Ends with a status, or waits for a signal and 'saves'."""

NAMER = '#!/bin/bash\nif [ "$1" = --help ]; then echo "$HELP"; else echo "${0##*/} $*" >> "$LOG"; fi\n'
"""Any launcher: says how it was called."""


@pytest.fixture
def cluster(tmp_path):
    """(script, words, variables) -> a process in an environment whose only cluster is made of stand-ins."""
    programs = {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}
    programs |= dict.fromkeys(("torchrun", "deepspeed", "pdsh"), NAMER)
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS_PER_NODE": "1(x2)"}

    def start(script, *words, **variables):
        own = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(tmp_path / "log"), **job, **variables}
        command = ["bash", CLUSTER / script, *words]
        return subprocess.Popen(command, env=own, stderr=subprocess.PIPE, text=True, cwd=tmp_path)

    return start


def ended(process) -> tuple[int, str]:
    """Exit status, and what it said."""
    _, said = process.communicate(timeout=20)
    return process.returncode, said


def log_of(folder: Path) -> list[str]:
    return sorted((folder / "log").read_text().splitlines()) if (folder / "log").exists() else []


def test_slurm_starts_one_process_a_task_which_find_each_other(cluster, tmp_path):
    assert ended(cluster("slurm.sh", "--version", "v 1")) == (0, "slurm: complete\n")
    words = "-m moellava.train.train --version v 1"
    ranks = [f"rank {rank}/2 local {rank} at node1:21234: {words}" for rank in (0, 1)]
    assert log_of(tmp_path)[:2] == ranks and log_of(tmp_path)[2].startswith("srun --kill-on-bad-exit=1 bash -c")
    assert len(log_of(tmp_path)) == 3


def test_slurm_runs_in_a_container(cluster, tmp_path):
    status, _ = ended(cluster("slurm.sh", "--version", "v1", RUN="env INSIDE=1"))
    assert status == 0 and "moellava env INSIDE=1 python -m moellava.train.train --version v1" in log_of(tmp_path)[-1]


def test_slurm_hands_a_stop_on_waits_and_queues_the_job_again(cluster, tmp_path):
    """The batch script and its step are both sent the signal, as Slurm does at a preemption."""
    process = cluster("slurm.sh", WAITS="1")
    deadline = time.monotonic() + 15
    while len(log_of(tmp_path)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # What is written says that all traps are set.
    (step,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[:1]
    os.kill(process.pid, signal.SIGTERM)
    os.kill(int(step), signal.SIGTERM)
    status, said = ended(process)
    assert status == 0 and "waiting for the checkpoint" in said and "queued again" in said
    assert {"saved by 0", "saved by 1", "scontrol requeue 41234"} <= set(log_of(tmp_path))


@pytest.mark.parametrize(
    ("own", "status", "said", "again"),
    [
        ({"STATUS": "143"}, 0, "stopped with a checkpoint; queued again", True),
        ({"STATUS": "2"}, 2, "failed with status 2; not queued again", False),
        ({"STATUS": "143", "SLURM_RESTART_COUNT": "3", "RESTARTS": "3"}, 143, "happened 3 times", False),
        ({"SLURM_GPUS_ON_NODE": "8"}, 2, "--ntasks-per-node is 1, but a node gives 8 GPUs", False),
    ],
)
def test_slurm_queues_again_what_was_stopped_and_nothing_else(own, status, said, again, cluster, tmp_path):
    code, text = ended(cluster("slurm.sh", **own))
    assert code == status and said in text
    assert ("scontrol requeue 41234" in log_of(tmp_path)) == again


def test_torchrun_is_given_hosts_and_time_to_save(cluster, tmp_path):
    own = {"NODES": "2", "MASTER": "node1:29500"}
    assert ended(cluster("torchrun.sh", "--version", "v1", HELP="--shutdown-timeout S", **own))[0] == 0
    assert ended(cluster("torchrun.sh", "--version", "v1", PROCESSES="4", **own))[0] == 0
    shared = "--rdzv-backend c10d --rdzv-endpoint node1:29500 --rdzv-id moellava"
    assert log_of(tmp_path) == [
        f"torchrun --nnodes 2 --nproc-per-node 1 {shared} --shutdown-timeout 600 -m moellava.train.train --version v1",
        f"torchrun --nnodes 2 --nproc-per-node 4 {shared} -m moellava.train.train --version v1",
    ]
    assert ended(cluster("torchrun.sh", "--version", "v1", MASTER="x"))[0] != 0


def test_a_hostfile_is_checked_before_it_is_used(cluster, tmp_path):
    (tmp_path / "hosts").write_text("# ours\nnode1 slots=8\nnode2  slots=4\n\n")
    assert ended(cluster("hostfile.sh", "hosts", "--version", "v1")) == (0, "")
    assert log_of(tmp_path) == ["deepspeed --hostfile hosts --module moellava.train.train --version v1"]
    assert ended(cluster("hostfile.sh", "hosts", "--version", "v1", NODE="1", MASTER="node1:29500"))[0] == 0
    where = "--master_addr node1 --master_port 29500 --no_ssh --node_rank 1"
    assert f"deepspeed --hostfile hosts {where} --module moellava.train.train --version v1" in log_of(tmp_path)
    assert "HOST:PORT" in ended(cluster("hostfile.sh", "hosts", "--version", "v1", NODE="1"))[1]
    (tmp_path / "hosts").write_text("node1 slots=8\nnode2\n")
    status, said = ended(cluster("hostfile.sh", "hosts", "--version", "v1"))
    assert status == 2 and "HOST slots=NUMBER" in said and "2:node2" in said
    assert ended(cluster("hostfile.sh", "nowhere", "--version", "v1"))[0] == 2
    (tmp_path / "hosts").write_text("node1 slots=8\n")
    (tmp_path / "pdsh").unlink()
    status, said = ended(cluster("hostfile.sh", "hosts", "--version", "v1", PATH=f"{tmp_path}:/bin"))
    assert status == 2 and "pdsh" in said


def test_the_image_holds_what_installing_needs_and_asks_for_extras_that_exist():
    text, setup = (ROOT / "Dockerfile").read_text(), (ROOT / "setup.py").read_text()
    extras = re.search(r"^ARG EXTRAS=(.+)$", text, re.M)
    assert extras and all(f'"{name}": [' in setup for name in extras[1].split(","))
    kept = {line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {"moellava", "setup.py", "constraints.txt", "scripts", *re.findall(r'ROOT / "([\w.]+)"', setup)} <= kept
    assert re.search(r"^USER \d+$", text, re.M) and 'CMD ["' in text, "no shell between docker and the run"
