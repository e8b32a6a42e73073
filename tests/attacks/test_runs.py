# SPDX-License-Identifier: Apache-2.0
"""A share of the kills; all of them are a command's."""

from __future__ import annotations

import pytest

from tests.attacks.runs import QUICK_POINTS, attacks


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_one_that_is_not(flags_for, tmp_path):
    (outcome,) = attacks(False, tmp_path, flags_for).values()
    assert not outcome.failures
    assert outcome.counts == {"goes on": QUICK_POINTS}
