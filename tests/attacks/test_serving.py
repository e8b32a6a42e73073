# SPDX-License-Identifier: Apache-2.0
"""Wrong requests to a server. See `serving.py`."""

import gc
import io
import resource
from functools import partial

import pytest
from PIL import Image

from moellava import heap
from moellava.data.embedded import data_uri
from tests.attacks.serving import CLIENTS, attacks, outcome_of
from tests.serve.api.serving import Server, asking, serving, sparse_vlm

SIDE = 2000
"""Pixels of a large picture's side: 12 MB once it is decoded, few bytes as a file."""


def failures_of(outcomes) -> list[str]:
    return [failure for outcome in outcomes.values() for failure in outcome.failures]


def test_a_share_of_what_is_asked_wrongly_is_named(tmp_path):
    outcomes = attacks(False, tmp_path)
    assert failures_of(outcomes) == []
    assert outcomes["requests to a server"].counts["named"] and outcomes["clients that leave a server"].counts["left"]


@pytest.mark.slow
def test_all_that_is_asked_wrongly_is_named(tmp_path):
    assert failures_of(attacks(True, tmp_path)) == []


def resident() -> int:
    """Bytes of this process in memory, without what is free already: how much of that the allocator keeps depends on
    what else the process has done."""
    gc.collect()
    heap.give_back()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_memory_comes_back_after_large_pictures(tmp_path, tokenizer_folder, clip_tower):
    written = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), "red").save(written, "PNG")
    body = asking("what?") | {"messages": [{"role": "user", "content": shown(data_uri(written.getvalue()))}]}
    ask = partial(Server.send, body=body)
    with serving(sparse_vlm(tmp_path, tokenizer_folder, clip_tower)) as server:
        outcome_of(server, [("first", ask)] * 8)
        server.settled()
        before = resident()
        outcome = outcome_of(server, [("large", ask)] * CLIENTS)
        assert outcome.failures == [] and outcome.counts["read"] == CLIENTS
        server.settled()
        assert resident() - before < 2 * 3 * SIDE**2, "pictures of requests that are answered are still in memory"


def shown(uri: str) -> list[dict]:
    """A message's content."""
    return [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "what?"}]
