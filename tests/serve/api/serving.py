# SPDX-License-Identifier: Apache-2.0
"""A server in a thread of this process, with real sockets: what tests of it share."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import uvicorn
from openai import OpenAI

from moellava.data.embedded import data_uri
from moellava.moe import MoESpec, upcycle
from moellava.serve.api.app import Service, Settings, create_app
from moellava.serve.api.limits import ServerLimits
from moellava.serve.api.scheduler import Scheduler
from moellava.vlm import VLM
from tests import tiny

NAME = "tiny"

SECONDS = 120.0
"""How long anything may take."""


def sparse_vlm(folder: Path, tokenizer: Path, tower: Path) -> VLM:
    """A random sparse model of 280 tokens, whose experts differ."""
    base = tiny.write_base(folder / "lm", "llama", tokenizer, noise=0.1)
    vlm = tiny.compose_tiny(base.folder, tower, "v1")
    spec = MoESpec(num_experts=4, top_k_experts=2, moe_mode="sparse")
    upcycle(vlm.model, spec)
    vlm.sparse(spec)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            if ".experts." in name or "router" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    vlm.model.eval()
    return vlm


@dataclass
class Server:
    """A server that runs.

    Attributes:
        service: what it asks.
        port: where it listens.
    """

    service: Service
    port: int
    key: str = "none"

    @property
    def url(self) -> str:
        """Its root."""
        return f"http://127.0.0.1:{self.port}"

    @cached_property
    def client(self) -> OpenAI:
        """OpenAI's own client."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=SECONDS)

    def send(
        self, method: str = "POST", path: str = "/v1/chat/completions", body: Any = None, **headers: str
    ) -> tuple[int, Any]:
        """(status, JSON) of a request as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        content = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, content, {"Content-Type": "application/json"} | named)
            response = connection.getresponse()
            said = response.read()
        finally:
            connection.close()
        return response.status, json.loads(said) if said[:1] in (b"{", b"[") else said.decode(errors="replace")

    def settled(self) -> None:
        """Returns once no request holds a slot."""
        end = time.monotonic() + SECONDS
        while self.service.slots.taken or self.service.scheduler.waiting():
            assert time.monotonic() < end, f"{self.service.slots.taken} slots are still taken"
            time.sleep(0.01)


@contextmanager
def serving(
    vlm: VLM, limits: ServerLimits | None = None, key: str | None = None, page: bool = False
) -> Iterator[Server]:
    """A server of a model, until the block ends."""
    service = Service(Scheduler(vlm, limits or ServerLimits()), Settings(NAME, key))
    app = create_app(service)
    if page:
        from moellava.serve.api.page import with_page

        app = with_page(app, service)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Server(service, listener.getsockname()[1], key or "none")
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def asking(text: str = "what colour is it?", *pictures: Path, **options: Any) -> dict[str, Any]:
    """A body that asks about pictures."""
    shown = [{"type": "image_url", "image_url": {"url": data_uri(path.read_bytes())}} for path in pictures]
    content = [*shown, {"type": "text", "text": text}] if shown else text
    return {"model": NAME, "messages": [{"role": "user", "content": content}], "max_tokens": 8, **options}
