# SPDX-License-Identifier: Apache-2.0
"""Records that processes and workers look at together."""

import os
import signal
import warnings

import pytest
import torch
import torch.distributed as dist

from moellava.data.scan import gathered, mapped, share, shared
from moellava.errors import BadFileError, DataError, UserError


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


def failing(error):
    """A look that fails at the fifth number, and at later ones in another way."""

    def look(number):
        if number == 5:
            raise error
        if number > 5:
            raise UserError("a later one")
        return number

    return look


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(
    "error", [UserError("words"), DataError(["one", "two"]), BadFileError("bad"), OSError(28, "No space", "file")]
)
def test_what_is_raised_is_the_same_whoever_looks(error, workers):
    """Its sort, its message and its place: a `DataLoader` alone would put a traceback before the message."""
    with pytest.raises(type(error)) as caught:
        mapped(failing(error), range(20), workers, chunk=4)
    assert type(caught.value) is type(error) and str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)


def ended(number):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_named():
    with pytest.raises(UserError, match="Counting: a process beside this one was ended from outside"):
        mapped(ended, range(20), 2, "Counting")


def test_a_bug_in_a_worker_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError, match="Original Traceback"):
        mapped(lambda number: 1 / number, range(20), 2)


def test_more_workers_than_cores_are_what_was_asked_for():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mapped(abs, range(20), len(os.sched_getaffinity(0)) + 1, chunk=2) == list(range(20))
