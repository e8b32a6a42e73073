# SPDX-License-Identifier: Apache-2.0
"""Wrong questions, options, lines and outputs. See `answers.py`."""

import pytest

from moellava.cli import COMMANDS
from tests.attacks.answers import ELSEWHERE, WORK, attacks


@pytest.mark.slow
def test_a_share_of_what_is_asked_wrongly_is_named(tmp_path):
    assert WORK.keys() | ELSEWHERE == COMMANDS.keys() and not WORK.keys() & ELSEWHERE
    outcomes = attacks(False, tmp_path)
    assert [failure for outcome in outcomes.values() for failure in outcome.failures] == []
    assert all(outcome.counts["named"] for outcome in outcomes.values())
