# SPDX-License-Identifier: Apache-2.0
"""`python train.py --deepspeed …` without a launcher: one process says so itself."""

from __future__ import annotations

import os
import socket

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""What launchers set, of torch, DeepSpeed and MPI."""


def stand_alone() -> None:
    """Sets what a launcher would set for one process, if there was none: DeepSpeed would look for MPI instead."""
    if any(name in os.environ for name in RANKS):
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone)
