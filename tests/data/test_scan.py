# SPDX-License-Identifier: Apache-2.0
"""Records that processes and workers look at together."""

import os

import pytest
import torch
import torch.distributed as dist

from moellava.data.scan import gathered, mapped, share, shared


def squares(numbers):
    return [number * number for number in numbers]


def looked_at(number):
    return number, os.getpid()


def one_of_two(rank: int, folder: str) -> None:
    """One of two processes: what it found, and what it looked at itself."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    own = []

    def look(numbers):
        own.extend(numbers)
        return squares(numbers)

    found = [shared(range(7), look), own, shared([], look), gathered(squares(range(*share(7))))]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_process_alone_looks_at_everything():
    assert shared(range(5), squares) == [0, 1, 4, 9, 16]
    assert gathered([1]) == [[1]] and list(range(*share(3))) == [0, 1, 2]


def test_two_processes_look_at_half_each_and_know_all(tmp_path):
    torch.multiprocessing.start_processes(one_of_two, (str(tmp_path),), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first[0] == second[0] == squares(range(7))
    assert (first[1], second[1]) == ([0, 2, 4, 6], [1, 3, 5])
    assert first[2] == second[2] == [] and first[3] == second[3] == [[0, 4, 16, 36], [1, 9, 25]]


@pytest.mark.parametrize("workers", [0, 2])
def test_findings_come_in_order_whoever_looks(workers):
    state = torch.random.get_rng_state()
    found = mapped(looked_at, range(200), workers)
    assert [number for number, _ in found] == list(range(200))
    assert len({process for _, process in found} - {os.getpid()}) == workers
    assert torch.equal(torch.random.get_rng_state(), state)
