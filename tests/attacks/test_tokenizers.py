# SPDX-License-Identifier: Apache-2.0
"""Tokenizers under chat templates. See `tokenizers.py`."""

from tests.attacks.tokenizers import BAD, FEW, RULES, TALKS, attacks


def test_a_share_of_templates_gives_the_ids_of_plain_transformers_or_is_named(tmp_path):
    outcomes = attacks(False, tmp_path)
    assert [failure for outcome in outcomes.values() for failure in outcome.failures] == []
    bad, crossed = outcomes.values()
    assert bad.counts["named"] == len(BAD)
    assert sum(crossed.counts.values()) == 2 * len(RULES) * len(FEW) * (len(TALKS) + 1)
    assert crossed.counts["one text"] > crossed.counts["a text for each answer"] > 20
