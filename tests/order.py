# SPDX-License-Identifier: Apache-2.0
"""Which tests are slow by their case, and in which order files run.

Processes share the files out (`--dist loadfile`), each the next one of the list; `--no-loadscope-reorder` in
pyproject.toml keeps them as they are sorted here, where xdist would sort them by the number of their tests.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

QUICK_CASES = {
    "lmm/test_adapters.py": "qwen2.5-vl",
    "lmm/test_chat.py": "llava-1.5|gemma3",
    "lmm/test_collators.py": "qwen2.5-vl|llava-1.5|gemma3|smolvlm|paligemma",
    "lmm/test_conformance.py": "llava-1.5|gemma3|llama-3.2-vision",
    "lmm/test_families_train.py": "llama-3.2-vision|phi3-v",
    "lmm/test_features.py": "llava-1.6|smolvlm",
    "lmm/test_golden_rows.py": "qwen2.5-vl|llava-1.5|gemma3|llama-3.2-vision|smolvlm",
    "lmm/test_loaders.py": "qwen2.5-vl|llava-1.5|gemma3|phi3-v",
    "lmm/test_released_folders.py": "qwen2.5-vl|llava-1.5|gemma3|phi3-v",
    "lmm/test_training.py": "v1|llava-1.5",
    "lmm/test_videos.py": "llava-onevision|internvl|gemma3",
    "lmm/test_known_pixels.py": "qwen2.5-vl|llava-1.6|phi3-v|smolvlm",
    "commands/test_inspect.py": "mistral|phi",
    "model/test_published.py": "phi|mistral",
    "data/test_tokenizers.py": "mistral|phi",
    "data/test_masking.py": "mistral|phi",
    "test_house.py": "stage 3|llava-1.5|published dense",
}
"""File -> the models and tokenizers (as a pattern of ids) whose cases of it are quick tests; those of others are slow.
What a file tests is tried on some of them often, and on all of them by the whole."""

MODELS = re.compile(r"qwen|stablelm|llava|smolvlm|phi|mistral|llama|gemma|paligemma|internvl|stage|published|v0|v1")

LONGEST = (
    "demo/test_demo.py",
    "demo/test_mixed.py",
    "lmm/test_released_runs.py",
    "scripts/test_recipes_run.py",
    "test_benchmarks.py",
    "train/test_hosts.py",
    "test_mutants.py",
    "test_quickstart.py",
)
"""Files of few tests, one of which takes a minute or more: begun last, it would keep one process busy after the
others have ended."""


def below_tests(item: pytest.Item) -> str:
    """The file of a test as the tables above name it."""
    return item.path.relative_to(Path(__file__).parent).as_posix()


def mark_slow_cases(items: list[pytest.Item]) -> None:
    """Marks what is slow by its case."""
    for item in items:
        quick = QUICK_CASES.get(below_tests(item))
        case = item.name.partition("[")[2]
        if quick and MODELS.search(case) and not re.search(quick, case):
            item.add_marker(pytest.mark.slow)


def sort_files(items: list[pytest.Item]) -> None:
    """Puts the longest files first, then those with many slow tests: those at the end are short, and processes end at
    about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (below_tests(item) not in LONGEST, -slow[item.path]))
