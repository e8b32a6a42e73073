# SPDX-License-Identifier: Apache-2.0
"""Answers that a language model grades, by a stand-in of OpenAI's API on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from moellava.cli import main
from moellava.errors import UserError
from moellava.eval import asking, jobs, judge
from moellava.eval.judge import Judge
from moellava.serve.answer import Answer
from moellava.vlm import open_vlm
from tests.serve.api.serving import NAME, serving, sparse_vlm

Reply = Callable[[str], tuple[int, Any]]


class Server:
    """A judge: what it was asked, with which key, and what it replies."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.keys: set[str | None] = set()
        self.reply: Reply = lambda text: (200, chat("0.5"))


def chat(text: str | None) -> dict[str, Any]:
    """A reply of a chat."""
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    """A stand-in that runs; its `url` is that of the API."""
    monkeypatch.setattr(judge, "FIRST_PAUSE", 0.0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    state: Any = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions" and body["model"] == "m" and body["temperature"] == 0
            state.asked.append(body["messages"][0]["content"])
            state.keys.add(self.headers["Authorization"])
            status, content = state.reply(state.asked[-1])
            said = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{running.server_address[1]}/v1"
    yield state
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture
def answering(monkeypatch, eval_model) -> None:
    """The model says the same to every question."""
    vlm = open_vlm(eval_model, device="cpu")
    monkeypatch.setattr(jobs, "open_vlm", lambda path: vlm)
    monkeypatch.setattr(asking, "answer", lambda vlm, requests, **options: [Answer("a guess")] * len(requests))


@pytest.fixture
def run(answering, eval_model, eval_data, server, tmp_path) -> Callable[[str], dict[str, Any]]:
    """(task) -> its result."""

    def score(task: str) -> dict[str, Any]:
        words = ["eval", "--model-path", str(eval_model), "--data-folder", str(eval_data), "--task", task]
        assert main([*words, "--output-dir", str(tmp_path), "--judge-url", server.url, "--judge-model", "m"]) == 0
        return json.loads((tmp_path / task / "result.json").read_text())

    return score


def test_mm_vet_is_graded(run, server, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.reply = lambda text: (200, chat("0.8" if len(server.asked) % 2 else "0.2"))
    result = run("mm-vet")
    assert result["score"] == pytest.approx(0.5)
    assert result["settings"]["judge"] == "m"
    assert all("-1 <AND> -5" in text and "a guess" in text for text in server.asked)
    assert server.keys == {"Bearer secret"}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]


def test_llava_bench_is_graded_against_the_reference(run, server):
    server.reply = lambda text: (200, chat("8 6\nThe first one is longer."))
    result = run("llava-bench")
    assert result["score"] == 0.75
    assert set(result["by_category"]) == {"conv", "detail", "complex"}
    assert server.keys == {None}
    assert any("plain 1" in text and "It is 1." in text for text in server.asked)


def test_what_was_graded_is_not_graded_again(run, server, tmp_path):
    run("llava-bench")
    assert len(server.asked) == 3
    (path,) = (tmp_path / "llava-bench").glob("reviews-*.jsonl")
    kept = path.read_text().splitlines(keepends=True)
    path.rename(path.with_name(path.name.replace(".jsonl", ".part-0.jsonl")))
    part = path.with_name(path.name.replace(".jsonl", ".part-0.jsonl"))
    part.write_text("".join(kept[:2]) + kept[2][:9])
    run("llava-bench")
    assert len(server.asked) == 4 and server.asked[3] in server.asked[:3]


def test_a_judge_that_says_something_else_is_counted(run, server):
    server.reply = lambda text: (200, chat(None))
    result = run("mm-vet")
    assert result["not_judged"] == 2
    assert result["score"] is None and result["interval"] is None


def test_a_busy_judge_is_asked_again(server):
    replies = iter([(429, {}), (503, {}), (200, b"no JSON"), (200, chat("1"))])
    server.reply = lambda text: next(replies)
    assert Judge(server.url, "m")(["hello"]) == ["1"]
    assert len(server.asked) == 4


@pytest.mark.parametrize(
    ("reply", "message", "tries"),
    [((401, {"error": "no key"}), "401.*no key", 1), ((500, {}), "500", 4), ((200, {"choices": []}), "no reply", 1)],
)
def test_a_judge_that_does_not_answer_is_one_message(server, reply, message, tries):
    server.reply = lambda text: reply
    with pytest.raises(UserError, match=message):
        Judge(server.url, "m")(["hello"])
    assert len(server.asked) == tries


def test_nobody_there(monkeypatch):
    monkeypatch.setattr(judge, "FIRST_PAUSE", 0.0)
    with pytest.raises(UserError, match="--judge-url http://127.0.0.1:9/v1: m does not answer"):
        Judge("http://127.0.0.1:9/v1", "m", timeout=1)(["hello"])


@pytest.mark.slow
def test_our_own_server_can_judge(tmp_path, tokenizer_folder, clip_tower):
    with serving(sparse_vlm(tmp_path, tokenizer_folder, clip_tower)) as running:
        said = Judge(f"{running.url}/v1", NAME, max_tokens=3)(["is it good?", "is it bad?"])
    assert len(said) == 2
