# SPDX-License-Identifier: Apache-2.0
"""What a server takes on: how much a request may bring, and how many requests there may be at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from moellava.data.images import Limits
from moellava.serve.api.refusals import Refusal


@dataclass(frozen=True)
class ServerLimits:
    """Looked at before anything is decoded.

    Attributes:
        requests: those that are read, wait or are answered at a time.
        batch_size: those that are answered together.
        body_bytes: of one request, pictures included.
        images: pictures of one request.
        image: how large a picture may be; its pixels are those of all pictures of a request together.
        new_tokens: the longest answer that may be asked for.
        domains: hosts that pictures may be fetched from, as URLs spell them: `example.com`, `localhost:8080`.
    """

    requests: int = 64
    batch_size: int = 8
    body_bytes: int = 16 * 2**20
    images: int = 16
    image: Limits = field(default_factory=lambda: Limits(pixels=2**25))
    new_tokens: int = 2048
    domains: frozenset[str] = frozenset()


class Slots:
    """How many requests are in the server.

    Args:
        limit: how many may be.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.taken = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """A slot, for as long as this is open. Raises Refusal (429) where none is free. Called in the event loop's
        thread alone, so that nothing comes between the question and the count."""
        if self.taken >= self.limit:
            raise Refusal(f"The server has {self.limit} requests already: ask again in a moment.", 429)
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
