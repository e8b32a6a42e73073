# SPDX-License-Identifier: Apache-2.0
"""What decides over slow cases and the order of files speaks of files that are there."""

from pathlib import Path

import pytest

from tests.order import LONGEST, QUICK_CASES, sort_files

TESTS = Path(__file__).parent


class Item:
    """A test of a file, slow or not."""

    def __init__(self, file: str, slow: bool):
        self.path, self.slow = TESTS / file, slow

    def get_closest_marker(self, name: str) -> bool:
        return self.slow


@pytest.mark.parametrize("file", [*QUICK_CASES, *LONGEST])
def test_a_file_that_is_named_is_there(file):
    assert (TESTS / file).is_file()


def test_the_longest_files_begin_and_those_without_slow_tests_end():
    items = [Item("a.py", False), Item("b.py", True), Item("c.py", True), Item("c.py", True), Item(LONGEST[0], False)]
    sort_files(items)
    assert [item.path.name for item in items] == [Path(LONGEST[0]).name, "c.py", "c.py", "b.py", "a.py"]
