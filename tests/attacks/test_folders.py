"""Damaged folders. See `folders.py`."""

import pytest

from tests.attacks.folders import attacks


def test_a_share_of_damaged_folders_open_as_they_were_or_are_named(tmp_path):
    outcomes = attacks(False, tmp_path)
    assert [failure for outcome in outcomes.values() for failure in outcome.failures] == []
    assert all(outcome.counts["named"] for outcome in outcomes.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_damage_to_every_file_is_named_or_harmless(tmp_path):
    outcomes = attacks(True, tmp_path)
    assert [failure for outcome in outcomes.values() for failure in outcome.failures] == []
    assert sum(sum(outcome.counts.values()) for outcome in outcomes.values()) > 700
