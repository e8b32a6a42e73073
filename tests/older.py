# SPDX-License-Identifier: Apache-2.0
"""What the tests know of transformers 5.20, the newest release for Python 3.10."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import transformers
from packaging.version import Version

IS_OLD = Version(transformers.__version__) < Version("5.23")

RENAMED = {"activation_checkpointing", "activation_checkpointing_kwargs"} if IS_OLD else set()
"""Flags of newer releases that are ours here, under the newer name."""


def newer(reason: str) -> Any:
    """A test of what only newer releases have, and why."""
    return pytest.mark.skipif(IS_OLD, reason=f"transformers {transformers.__version__}: {reason}")


PAGE = newer("the page is of the release that constraints.txt has, with the classes there")
SHARDS = newer("--fsdp_size is refused")
CHUNKS = newer("a prompt that is read in chunks gets its pictures with each of them")
SMOLVLM = newer("SmolVLM's features are cut by the side of a patch, which fits real models and not the tiny one")


def marked(names: Iterable[str]) -> list[Any]:
    """Parameters of a test that has tiny models read their features."""
    return [pytest.param(name, marks=SMOLVLM) if name == "smolvlm" else name for name in names]
