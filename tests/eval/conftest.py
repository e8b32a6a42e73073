# SPDX-License-Identifier: Apache-2.0
"""A tiny model, and the miniatures of all benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.eval.miniatures import write_all
from tests.tiny import compose_tiny


@pytest.fixture(scope="session")
def eval_model(parts, tmp_path_factory) -> Path:
    """The folder of a composed model that has learnt nothing."""
    path = tmp_path_factory.mktemp("eval-model") / "tiny"
    compose_tiny(parts / "lm", parts / "tower", "qwen").save(path, meta={"version": "qwen"})
    return path


@pytest.fixture(scope="session")
def eval_data(tmp_path_factory) -> Path:
    """The root of all miniatures. Not to be changed by a test."""
    return write_all(tmp_path_factory.mktemp("eval-data"))
