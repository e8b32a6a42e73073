# SPDX-License-Identifier: Apache-2.0
"""Requests to a server that are wrong, by 32 clients at once: each is named or read, and the server goes on.

python -m tests.attacks --only serving --all
"""

from __future__ import annotations

import base64
import copy
import json
import random
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from moellava.data.images import Limits
from moellava.serve.api.limits import ServerLimits
from tests import tiny
from tests.attacks.outcome import Outcome
from tests.serve.api.serving import Server, asking, serving, sparse_vlm

CLIENTS = 32

FUZZED, LEAVING = 1000, 200
"""How many requests are changed at random, and how many are cut off."""

EVERY = 40
"""The share that is quick takes one of so many."""

LIMITS = ServerLimits(body_bytes=10**6, image=Limits(pixels=10**6), new_tokens=16)

VALUES: list[Any] = [None, True, False, -1, 0, 1, 3, 2**70, -1e308, 0.5, float("nan"), float("inf"), "", "a", "\ud83d"]
VALUES += ["\0", "a" * 9000, "<image>", "<video>", "</s>", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/a"]
VALUES += [
    "data:image/png;base64,",
    "data:,",
    [],
    {},
    [[]],
    [None],
    {"type": "text"},
    {"url": {}},
    "user",
    "system",
    "tool",
]
"""What a field may hold after a change."""

NAMES = [
    "model",
    "messages",
    "content",
    "role",
    "type",
    "url",
    "image_url",
    "stream",
    "n",
    "tools",
    "seed",
    "\ud83d",
    "a",
]

ROUTES = [("GET", "/v1/models"), ("GET", "/health"), ("POST", "/v1/models"), ("GET", "/v1/chat/completions")]
ROUTES += [
    ("PUT", "/v1/chat/completions"),
    ("GET", "/v1/models/%00"),
    ("GET", "/../../etc/passwd"),
    ("GET", "/%2e%2e/a"),
]
ROUTES += [
    ("OPTIONS", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "//a"),
    ("DELETE", "/v1/models/tiny"),
]

TELLS_TOO_MUCH = re.compile(r"0x[0-9a-f]{6,}|/(?:tmp|root|work|home|usr|etc)/|Traceback", re.IGNORECASE)

Send = Callable[[Server], tuple[int, Any]]


def attacks(everything: bool, folder: Path) -> dict[str, Outcome]:
    """Requests that are changed at random, and clients that leave."""
    step = 1 if everything else EVERY
    vlm = sparse_vlm(folder, tiny.write_tokenizer(folder / "tokenizer"), tiny.write_clip(folder / "clip"))
    pictures = tiny.write_pictures(folder / "pictures")
    with serving(vlm, LIMITS) as server:
        expected = server.send(body=asking("what?", pictures[0]))[1]["choices"]
        fuzzed = outcome_of(server, list(changed(pictures, FUZZED // step)))
        leaving = outcome_of(server, list(cut_off(pictures, LEAVING // step)))
        server.settled()
        for outcome in (fuzzed, leaving):
            if server.send(body=asking("what?", pictures[0]))[1].get("choices") != expected:
                outcome.failures.append("a good request is answered otherwise than before")
    return {"requests to a server": fuzzed, "clients that leave a server": leaving}


def outcome_of(server: Server, sends: list[tuple[str, Send]]) -> Outcome:
    """Sends all, many at a time."""
    outcome = Outcome()
    with ThreadPoolExecutor(CLIENTS) as pool:
        runs = [(name, pool.submit(send, server)) for name, send in sends]
    for name, run in runs:
        error = run.exception()
        verdict = f"{error!r}" if error else verdict_of(*run.result())
        if verdict in ("read", "named", "left"):
            outcome.counts[verdict] += 1
        else:
            outcome.failures.append(f"{name[:300]}: {verdict}")
    return outcome


def verdict_of(status: int, said: Any) -> str:
    """'read', 'named', 'left', or what is wrong with an answer."""
    if status in (0, 200):
        return "left" if status == 0 else "read"
    error = said.get("error") if isinstance(said, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    if status >= 500 or not message or TELLS_TOO_MUCH.search(json.dumps(said)):
        return f"{status} {said!r:.500}"
    return "named"


def bodies(pictures: list[Path]) -> list[dict[str, Any]]:
    """Good ones."""
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a"}]
    turns += [{"role": "assistant", "content": "b"}, {"role": "user", "content": [{"type": "text", "text": "c"}]}]
    drawn = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 3, "stop": ["x", "yz"], "repetition_penalty": 1.1}
    return [
        asking("what?", *pictures[:2], logprobs=True, top_logprobs=2),
        asking("what?", pictures[2], stream=True, stream_options={"include_usage": True}),
        asking("what?", **drawn),
        asking() | {"messages": turns},
    ]


def changed(pictures: list[Path], count: int) -> Iterator[tuple[str, Send]]:
    """Requests of which something is changed at random."""
    for number in range(count):
        draw = random.Random(number)
        if draw.random() < 0.05:
            method, path = draw.choice(ROUTES)
            body = b"{}" if method in ("POST", "PUT") else None
            yield f"{method} {path}", partial(Server.send, method=method, path=path, body=body)
            continue
        body = copy.deepcopy(draw.choice(bodies(pictures)))
        change = draw.choice([replace_value, replace_value, remove_key, add_key, damage_picture])
        for _ in range(draw.choice([1, 1, 1, 3])):
            change(body, draw)
        content = json.dumps(body).encode()
        if draw.random() < 0.2:
            content = damaged(content, draw)
        headers = {} if draw.random() < 0.95 else {"Content_Type": draw.choice(["", "text/plain", "application/jsonx"])}
        yield f"{number}: {content[:250]!r}", partial(Server.send, body=content, **headers)


def places(node: Any) -> list[tuple[Any, Any]]:
    """(list or object, key) of everything in a body."""
    keys: Any = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [place for key in keys for place in [(node, key), *places(node[key])]]


def replace_value(body: dict[str, Any], draw: random.Random) -> None:
    """Another value for a field."""
    if found := places(body):
        node, key = draw.choice(found)
        node[key] = copy.deepcopy(draw.choice(VALUES))


def remove_key(body: dict[str, Any], draw: random.Random) -> None:
    """A field less."""
    if found := places(body):
        node, key = draw.choice(found)
        del node[key]


def add_key(body: dict[str, Any], draw: random.Random) -> None:
    """A field more."""
    nodes = [body, *(node[key] for node, key in places(body) if isinstance(node[key], dict))]
    draw.choice(nodes)[draw.choice(NAMES)] = copy.deepcopy(draw.choice(VALUES))


def damage_picture(body: dict[str, Any], draw: random.Random) -> None:
    """A picture whose file is damaged."""
    for node, key in places(body):
        if key == "url" and isinstance(node[key], str) and "," in node[key]:
            head, _, content = node[key].partition(",")
            node[key] = f"{head},{base64.b64encode(damaged(base64.b64decode(content), draw)).decode()}"


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Bytes that are cut, or some of which are changed."""
    if not content or draw.random() < 0.3:
        return content[: draw.randrange(len(content) + 1)]
    changed_bytes = bytearray(content)
    for _ in range(draw.choice([1, 3, 30])):
        changed_bytes[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(changed_bytes)


def cut_off(pictures: list[Path], count: int) -> Iterator[tuple[str, Send]]:
    """Clients that leave: in the head, in the body, before the answer, in the answer."""
    for number in range(count):
        draw = random.Random(number)
        body = json.dumps(asking("what?", draw.choice(pictures), stream=draw.random() < 0.5, max_tokens=16)).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        whole = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        size = draw.choice([draw.randrange(len(head)), draw.randrange(len(whole)), len(whole), len(whole)])
        yield f"cut off after {size} bytes", partial(leave, content=whole[:size], reads=draw.choice([0, 0, 10]))


def leave(server: Server, content: bytes, reads: int) -> tuple[int, Any]:
    """Sends some bytes, reads as many as asked if any come, and goes. Returns status 0."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.5) as connection:
        connection.sendall(content)
        if reads:
            try:
                connection.recv(reads)
            except TimeoutError:
                return 0, None
    return 0, None
