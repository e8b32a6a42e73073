# SPDX-License-Identifier: Apache-2.0
"""Damaged folders. See `folders.py`."""

from tests.attacks.folders import attacks


def test_a_share_of_damaged_folders_open_as_they_were_or_are_named(tmp_path):
    outcomes = attacks(False, tmp_path)
    assert [failure for outcome in outcomes.values() for failure in outcome.failures] == []
    assert all(outcome.counts["named"] for outcome in outcomes.values())
