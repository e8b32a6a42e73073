# SPDX-License-Identifier: Apache-2.0
"""What is remembered, how much of it, and that it can be sent to another process."""

from __future__ import annotations

import pickle

from moellava.data.remembered import Remembered


class Counter:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.square = Remembered(self._square, 2)

    def _square(self, number: int) -> int:
        self.asked.append(number)
        return number * number


def test_a_value_is_found_out_once():
    counter = Counter()
    assert [counter.square(number) for number in (3, 4, 3, 4)] == [9, 16, 9, 16]
    assert counter.asked == [3, 4]


def test_no_more_than_the_limit_is_kept():
    counter = Counter()
    for number in range(5):
        assert counter.square(number) == number**2
        assert len(counter.square.values) <= 2
    counter.square(4)
    assert counter.asked == [0, 1, 2, 3, 4]


def test_it_goes_to_another_process_with_its_owner():
    counter = Counter()
    counter.square(3)
    other = pickle.loads(pickle.dumps(counter))
    assert (other.square(3), other.square(5)) == (9, 25)
    assert other.asked == [3, 5] and counter.asked == [3]
