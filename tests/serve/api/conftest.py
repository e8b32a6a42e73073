# SPDX-License-Identifier: Apache-2.0
"""A tiny sparse model, and a server of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moellava.vlm import VLM
from tests.serve.api.serving import Server, serving, sparse_vlm


@pytest.fixture(scope="session")
def sparse(tmp_path_factory, tokenizer_folder, clip_tower) -> VLM:
    """See `sparse_vlm`."""
    return sparse_vlm(tmp_path_factory.mktemp("sparse"), tokenizer_folder, clip_tower)


@pytest.fixture(scope="module")
def server(sparse) -> Iterator[Server]:
    """A server with the usual limits, without key and page."""
    with serving(sparse) as running:
        yield running
