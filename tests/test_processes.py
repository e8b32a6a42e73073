# SPDX-License-Identifier: Apache-2.0
"""What processes of a run tell each other."""

import torch
import torch.distributed as dist

from moellava.processes import joined_over_processes, leave_group, of_rank_zero


def meet(rank: int, folder: str) -> None:
    """One of two processes: what it hears, and whether it has left in the end."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    heard = of_rank_zero(f"the day of {rank}"), joined_over_processes({rank: "here"})
    leave_group()
    torch.save((*heard, dist.is_initialized()), f"{folder}/{rank}.pt")


def test_two_processes_agree_and_leave_together(tmp_path):
    """Spawned, as a launcher starts them: a process that is forked inherits this one's threads' locks."""
    torch.multiprocessing.start_processes(meet, (str(tmp_path),), nprocs=2, start_method="spawn")
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == ("the day of 0", {0: "here", 1: "here"}, False)


def test_a_process_alone_asks_nobody():
    assert of_rank_zero("today") == "today" and joined_over_processes({0: 1}) == {0: 1}
    leave_group()
