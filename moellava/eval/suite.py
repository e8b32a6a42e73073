# SPDX-License-Identifier: Apache-2.0
"""All benchmarks: to import this module is to register them. A new one is one file beside it, and one word here."""

from moellava.eval import easy_vqa, gqa, judged, mmbench, mme, own, pope, scienceqa, seed_bench, vqa
from moellava.eval.benchmarks import BENCHMARKS

ENTRIES = (easy_vqa, vqa, gqa, scienceqa, pope, mme, mmbench, seed_bench, judged, own)

__all__ = ["BENCHMARKS", "ENTRIES"]
