# SPDX-License-Identifier: Apache-2.0
"""What becomes of freed memory, counted in fresh processes by the pages that the kernel had to find."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
import os, resource

from moellava import heap

SIZE = 48 * 2**20

def pages(size=SIZE):
    return size // resource.getpagesize()

def used_again(size=SIZE, times=4):
    '''Pages found anew, of those of a block that is allocated, written and freed several times.'''
    b"a" * size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        b"a" * size
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (times * pages(size))

def resident():
    return int(open("/proc/self/statm").read().split()[1]) / pages()

def left_below_another():
    '''What stays of a block that is freed while one above it is not.'''
    before = resident()
    block, above = b"a" * SIZE, b"a" * 2**19
    del block
    return resident() - before, above
"""


def told(script: str) -> list[float]:
    """The numbers that a script prints."""
    words = [sys.executable, "-c", PRELUDE + textwrap.dedent(script)]
    return [float(word) for word in subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()]


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it is about glibc")


def test_freed_memory_is_used_again_inside_and_given_back_behind():
    outside, inside, held, behind, again = told("""
        print(used_again())
        base = resident()
        with heap.kept():
            print(used_again(), resident() - base)
        print(resident() - base, used_again())
    """)
    assert outside > 0.9 and again > 0.9, "48 MB are mapped, and given back each time"
    assert inside < 0.05 and held > 0.9
    assert behind < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("where", ["with heap.kept()", "if not heap.keep_some_in_forks()"])
def test_data_workers_use_blocks_of_a_batch_again_and_no_more(where):
    """Of 16 MB, and of 96, which would be mapped alone; what is more than 512 is given back."""
    blocks, batch, more = told(f"""
        {where}:
            if os.fork() == 0:
                print(used_again(2**24), used_again(2 * SIZE), used_again(12 * SIZE), flush=True)
                os._exit(0)
            os.wait()
    """)
    assert blocks < 0.05 and batch < 0.05 and more > 0.9


def test_what_is_free_is_given_back_when_asked():
    before, after = told("""
        base = resident()
        with heap.kept():
            used_again()
            print(resident() - base)
            heap.give_back()
            print(resident() - base)
    """)
    assert before > 0.9 and after < 0.1


def test_blocks_above_a_size_are_mapped_by_themselves():
    below, above = told("""
        heap.give_back_above(2**30)
        print(left_below_another()[0])
        heap.give_back()
        heap.give_back_above(2**20)
        print(left_below_another()[0])
    """)
    assert above < 0.1 < 0.9 < below


def test_another_allocator_is_left_alone(monkeypatch):
    from moellava import heap

    monkeypatch.setattr(heap, "_of_glibc", lambda name: None)
    with heap.kept():
        heap.give_back()
    heap.give_back_above(1)
