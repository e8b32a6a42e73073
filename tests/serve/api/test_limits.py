# SPDX-License-Identifier: Apache-2.0
"""What is refused before anything is decoded, who may ask, and what a client that leaves gives back."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import struct
import threading
import time
import zlib
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from PIL import Image

from moellava.data.embedded import data_uri
from moellava.data.images import Limits
from moellava.serve.api import scheduler as scheduling
from moellava.serve.api.app import create_app
from moellava.serve.api.limits import ServerLimits
from moellava.serve.api.refusals import LONGEST, public
from tests.serve.api.serving import SECONDS, Server, asking, serving

KEY = "a-key"

SMALL = ServerLimits(body_bytes=100_000, images=3, image=Limits(pixels=5_000, side=200), new_tokens=64)


def png_head(width: int, height: int) -> bytes:
    """A picture that says it is large, and holds nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def showing(*urls: str) -> dict:
    """A body that shows pictures."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return asking() | {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}]}


def saying(*turns: tuple[str, object]) -> dict:
    """A body of turns."""
    return asking() | {"messages": [{"role": role, "content": content} for role, content in turns]}


PIXEL = data_uri(png_head(1, 1))

SHOWN = showing(PIXEL)["messages"][0]["content"]

REFUSED: dict[str, tuple[dict, int, str]] = {
    "no field": ({}, 400, "model: Field required"),
    "unknown field": (asking(best_of=3), 400, "best_of: Extra inputs"),
    "another model": (asking() | {"model": "other"}, 404, "'other'"),
    "no turn": (saying(), 400, "messages"),
    "half a character": (saying(("user", "\ud83d")), 400, ""),
    "the assistant last": (saying(("user", "a"), ("assistant", "b")), 400, "end with human"),
    "a late system prompt": (saying(("user", "a"), ("system", "b")), 400, "at the beginning"),
    "a picture of the system": (
        saying(("system", showing(PIXEL)["messages"][0]["content"]), ("user", "a")),
        400,
        "user alone",
    ),
    "a tag without picture": (asking("<image> what?"), 400, "0 images but 1 <image> tags"),
    "too long a prompt": (asking("many words " * 500), 400, "tokens, images included"),
    "too long an answer": (asking(max_tokens=65), 400, "64 at most"),
    "two lengths": (asking(max_completion_tokens=3), 400, "one thing"),
    "no length": (asking(max_tokens=0), 400, "max_new_tokens is 0"),
    "cold": (asking(temperature=-1), 400, "temperature is -1"),
    "top_p at temperature 0": (asking(top_p=0.5), 400, "nothing is sampled"),
    "five stops": (asking(stop=list("abcde")), 400, "up to 4"),
    "an empty stop": (asking(stop=""), 400, "none empty"),
    "top_logprobs alone": (asking(top_logprobs=3), 400, "logprobs: true"),
    "a tool": (asking(tools=[{"type": "function"}]), 400, "tools"),
    "JSON answers": (asking(response_format={"type": "json_object"}), 400, "response_format"),
    "four pictures": (showing(*[PIXEL] * 4), 400, "takes 3"),
    "a path": (showing("/etc/passwd"), 400, "neither a data URI"),
    "a file": (showing("file:///etc/passwd"), 400, "neither a data URI"),
    "the web": (showing("https://example.com/a.png"), 400, "'example.com' are not fetched"),
    "no base64": (showing("data:image/png;base64,%%%"), 400, "base64"),
    "text": (showing(data_uri(b"hello")), 400, "no picture"),
    "PostScript": (showing(data_uri(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")), 400, "no picture"),
    "a cut picture": (showing(PIXEL[:-40]), 400, "not an image"),
    "a picture without pixels": (showing(data_uri(png_head(20, 20))), 400, "cannot be read"),
    "a bomb": (
        showing(data_uri(png_head(30_000, 30_000))),
        400,
        "0000 pixels",
    ),  # by Pillow or by us: its limit is the process's
    "a long picture": (showing(data_uri(png_head(201, 2))), 400, "--max_image_side is 200"),
    "large together": (showing(*[data_uri(png_head(50, 50))] * 3), 413, "7500 pixels together"),
}
"""Body, status, and words of the refusal."""


@pytest.fixture(scope="module")
def small(sparse):
    """A server with small limits."""
    with serving(sparse, SMALL) as running:
        yield running


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_server_does_not_take_is_named(small, case):
    body, status, words = REFUSED[case]
    given, said = small.send(body=body)
    assert given == status, said
    assert words in said["error"]["message"]
    assert "0x" not in said["error"]["message"] and "/etc" not in said["error"]["message"]
    assert small.service.slots.taken == 0


def test_bodies_and_routes_that_mean_nothing_are_named(small):
    assert small.send(body=b"{")[0] == 400
    assert small.send(body=b'{"model": ' + b"[" * 50_000)[0] == 400
    assert small.send(body=b"\xff\xfe")[0] == 400
    assert small.send(body=asking(), Content_Type="text/plain")[0] == 415
    assert small.send(body=b" " * 100_001)[0] == 413
    assert small.send("GET")[0] == 405
    status, said = small.send("GET", "/nowhere/0x7f00deadbeef")
    assert (status, said["error"]["type"]) == (404, "not_found_error")


def test_a_body_has_a_size(small):
    with socket.create_connection(("127.0.0.1", small.port), SECONDS) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(99).startswith(b"HTTP/1.1 411")


def test_other_sites_may_not_ask(small):
    assert small.send(body=asking(), Host="evil.example")[0] == 403
    assert small.send(body=asking(), Origin="https://evil.example")[0] == 403
    assert small.send(body=asking(), Origin="null")[0] == 403
    assert small.send(body=asking(), Origin=f"http://127.0.0.1:{small.port}")[0] == 200


def routes(app, prefix: str = "") -> list[tuple[str, str]]:
    """(method, path) of each route, those of what is mounted or included, too."""
    found = []
    for route in app.routes:
        found += [(method, prefix + route.path) for method in getattr(route, "methods", None) or ()]
        if hasattr(route, "original_router"):
            found += routes(route.original_router, prefix)
        elif hasattr(route, "app") and hasattr(route.app, "routes"):
            found += routes(route.app, prefix + route.path.rstrip("/"))
    return found


def test_every_route_asks_for_the_key(sparse):
    with serving(sparse, SMALL, key=KEY) as server:
        every = routes(create_app(server.service))
        assert len(every) == 4
        require_key(server, every)
        basic = base64.b64encode(f"anyone:{KEY}".encode()).decode()
        wrong = base64.b64encode(b"anyone:other").decode()
        keys = {f"Bearer {KEY}": 200, f"Basic {basic}": 200, f"bearer {KEY}": 200, "Bearer other": 401, KEY: 401}
        keys |= {f"Basic {wrong}": 401, "Basic %%%": 401, "Bearer ": 401, "Bearer \xe4": 401, f"Token {KEY}": 401}
        keys |= {f"Bearer {KEY}x": 401, f"Bearer {KEY[:-1]}": 401}
        for header, status in keys.items():
            for path in ("/v1/models", "/health"):
                assert server.send("GET", path, Authorization=header)[0] == status, header
        assert server.client.models.list().data[0].id == "tiny"
        assert server.send("GET", "/health", Authorization=f"Bearer {KEY}", Host="a.name.of.ours")[0] == 200


def require_key(server: Server, every: list[tuple[str, str]]) -> None:
    """Fails where a route answers without a key."""
    for method, path in [*every, ("GET", "/"), ("POST", "/nowhere")]:
        if method != "HEAD":
            status, said = server.send(method, path.replace("{", "").replace("}", ""))
            assert (status, said["error"]["type"]) == (401, "authentication_error"), path


@pytest.mark.slow
def test_every_route_of_the_page_asks_for_the_key(sparse):
    from moellava.serve.api.page import with_page

    with serving(sparse, SMALL, key=KEY, page=True) as server:
        every = routes(with_page(create_app(server.service), server.service))
        assert len(every) > 50 and ("POST", "/gradio_api/upload") in every
        require_key(server, every)
        key = {"Authorization": f"Bearer {KEY}"}
        assert server.send("GET", "/", **key)[0] == 200
        for path in ("HTTP://evil.example/a.png", "https://evil.example/a.png"):  # Gradio would fetch them
            body = {"data": [{"text": "", "files": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}]}
            status, said = server.send("POST", "/gradio_api/queue/join", body, **key)
            assert status == 403 and "fetches nothing" in said["error"]["message"]
        assert server.send("POST", "/gradio_api/queue/join", b"[" * 50_000, **key)[0] == 422


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("moment", ["waiting", "answering"])
def test_a_client_that_leaves_gives_its_slot_back(server: Server, monkeypatch, stream, moment):
    said, go_on, plain = threading.Event(), threading.Event(), scheduling.Growing.take

    def slowly(self, *args):
        said.set()
        if moment == "answering":
            time.sleep(0.02)
        else:
            go_on.wait(SECONDS)
        return plain(self, *args)

    monkeypatch.setattr(scheduling.Growing, "take", slowly)
    connections = []
    for _ in range(3):
        connections.append(http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS))
        body = json.dumps(asking(max_tokens=400, stream=stream))
        connections[-1].request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    assert said.wait(SECONDS)
    assert server.service.slots.taken > 0
    for connection in connections:
        connection.close()
    server.settled()  # also while the model is at work
    go_on.set()
    monkeypatch.undo()
    began = time.monotonic()
    assert server.send(body=asking())[0] == 200
    assert time.monotonic() - began < SECONDS / 2, "the answers that nobody reads have gone on"


class Host(BaseHTTPRequestHandler):
    """A host of a picture, a redirect to it, and what is too large."""

    content = b""

    def do_GET(self) -> None:
        self.send_response(302 if self.path == "/elsewhere.png" else 200)
        self.send_header("Location", "/a.png")
        self.end_headers()
        with suppress(OSError):  # who asks has read enough
            self.wfile.write(self.content * (1 if self.path == "/a.png" else 1000))

    def log_message(self, *args: object) -> None:
        """Says nothing."""


def test_pictures_of_named_hosts_alone_are_fetched(sparse, pictures: list[Path]):
    Host.content = pictures[0].read_bytes()
    host = HTTPServer(("127.0.0.1", 0), Host)
    thread = threading.Thread(target=host.serve_forever)
    thread.start()
    name = f"127.0.0.1:{host.server_port}"
    try:
        with serving(sparse, ServerLimits(domains=frozenset({name}), body_bytes=10**5)) as server:
            status, said = server.send(body=showing(f"http://{name}/a.png"))
            expected = server.send(body=showing(data_uri(Host.content)))[1]
            assert status == 200 and said["choices"] == expected["choices"]
            for url, words in {
                f"http://{name}/elsewhere.png": "status 302",
                f"http://{name}/large.png": "more than 100000 bytes",
                f"http://user@{name}/a.png": "are not fetched",
                f"http://{name}.evil.example/a.png": "are not fetched",
                f"HTTP://evil.example\\@{name}/a.png": "are not fetched",
                "http://[::1/a.png": "no URL",
                "http://127.0.0.1:1/a.png": "are not fetched",
            }.items():
                status, said = server.send(body=showing(url))
                assert status in (400, 413) and words in said["error"]["message"], url
    finally:
        host.shutdown()
        thread.join()
        host.server_close()


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("<_io.BytesIO object at 0x7f3c2a1b> is none", "<_io.BytesIO object at …> is none"),
        ("--model-path /root/models/a: holds no tokenizer", "--model-path …: holds no tokenizer"),
        ("'/tmp/gradio/ab/x.png' and ~/secret, ../up", "'…' and …, …"),
        ("C:\\Users\\me\\x.png is none", "… is none"),
        ("image/png of https://a.b/c, 3 tokens/s, <image>", "image/png of https://a.b/c, 3 tokens/s, <image>"),
        ("a\x1b[2Jb", "a\\u001b[2Jb"),
    ],
)
def test_messages_tell_no_addresses_and_paths(message, told):
    assert public(message) == told


def test_messages_are_cut():
    assert len(public("a" * 10_000)) == LONGEST


def test_a_picture_is_decoded_by_what_it_is(server):
    """A WebP that calls itself a PNG is one."""
    written = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(written, "WEBP")
    uri = "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()
    assert server.send(body=showing(uri))[0] == 200
