# SPDX-License-Identifier: Apache-2.0
"""Random records: none is lost, none ends in a traceback. See `records.py`."""

import pytest

from tests.attacks.records import ALL, QUICK, Attack


def test_a_sample_of_random_records_is_read_faithfully_or_refused_by_name(tokenizers, tmp_path):
    counts = Attack(tokenizers["phi"]).run(QUICK, tmp_path)
    assert counts["read"] > QUICK // 3 and counts["refused"] > QUICK // 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi", "mistral"])
def test_all_random_records_are_read_faithfully_or_refused_by_name(name, tokenizers, tmp_path):
    counts = Attack(tokenizers[name]).run(ALL, tmp_path, seed=1)
    assert counts["read"] + counts["refused"] >= ALL
