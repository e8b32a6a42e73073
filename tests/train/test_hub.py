# SPDX-License-Identifier: Apache-2.0
"""`--push_to_hub` against a stand-in of the hub: a server that speaks as much of its API as an upload needs."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard, constants

from moellava.errors import UserError
from moellava.files import DIGESTS, PAGE, file_digest
from moellava.train import hub as hub_module
from moellava.train.arguments import parse_arguments
from moellava.train.hub import Hub, files_of
from moellava.train.train import main, train
from tests.processes import run_train, train_here, words_of

TOKEN, READER = "hf_secret_of_mine", "hf_secret_of_a_reader"


class StandIn(ThreadingHTTPServer):
    """A hub in memory: repositories, and what was committed to each of their branches."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.private: dict[str, bool] = {}
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.refuses_commits = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: StandIn

    def log_message(self, *args):
        """Says nothing."""

    def _reply(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _may(self, tokens) -> bool:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") in tokens

    def do_GET(self):
        """Who the token belongs to, and what a repository is."""
        path = self.path.partition("?")[0]
        self.server.asked.append(f"GET {path}")
        if not self._may((TOKEN, READER)):
            return self._reply({"error": "Invalid credentials"}, 401)
        if path == "/api/whoami-v2":
            return self._reply({"name": "me", "type": "user", "orgs": []})
        name = path.removeprefix("/api/models/")
        if name not in self.server.private:
            return self._reply({"error": "Repository not found"}, 404)
        return self._reply({"id": name, "modelId": name, "private": self.server.private[name], "siblings": []})

    def do_PUT(self):
        """A large file."""
        content = self._body()
        self.server.blobs[hashlib.sha256(content).hexdigest()] = content
        self._reply({})

    def do_POST(self):
        """Making a repository or a branch, and the steps of a commit."""
        path, server, body = self.path.partition("?")[0], self.server, self._body()
        server.asked.append(f"POST {path}")
        if not self._may((TOKEN,)):
            return self._reply({"error": "Forbidden"}, 403)
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization'] or 'me'}/{given['name']}"
            if name in server.private:
                return self._reply({"error": "exists", "url": f"{server.url}/{name}"}, 409)
            server.private[name] = given.get("visibility") == "private"
            return self._reply({"url": f"{server.url}/{name}", "id": name})
        if path == "/api/validate-yaml":
            ModelCard(json.loads(body)["content"])
            return self._reply({"errors": [], "warnings": []})
        if "/branch/" in path:
            return self._reply({})
        if path.endswith(".git/info/lfs/objects/batch"):
            where = {"upload": {"href": f"{server.url}/upload", "header": {}}}
            objects = [one | {"actions": where} for one in json.loads(body)["objects"]]
            return self._reply({"transfer": "basic", "objects": objects})
        _, _, _, owner, name, step, revision = path.split("/")
        if step == "preupload":
            files = json.loads(body)["files"]
            modes = {f["path"]: "lfs" if "safetensors" in f["path"] else "regular" for f in files}
            rows = [{"path": path, "shouldIgnore": False, "uploadMode": mode} for path, mode in modes.items()]
            return self._reply({"files": rows})
        assert step == "commit"
        if server.refuses_commits:
            return self._reply({"error": "full"}, 500)
        held = server.files.setdefault((f"{owner}/{name}", revision), {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                held[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                held[value["path"]] = server.blobs[value["oid"]]
        url = f"{server.url}/{owner}/{name}/commit/abc"
        return self._reply({"success": True, "commitOid": "abc", "commitUrl": url, "pullRequestUrl": None})


@pytest.fixture
def online(monkeypatch):
    """A stand-in, which this process takes for the hub."""
    with StandIn() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.hf_api, "get_token", lambda: None)
        yield server
        server.shutdown()


@pytest.fixture
def flags(flags_for, tmp_path):
    """Flags of a short stage 1 that is uploaded."""
    own = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "skip_dry_save": True}
    push = {"push_to_hub": True, "hub_token": TOKEN, "hub_model_id": "tiny-vlm", "report_to": "tensorboard"}
    return flags_for(tmp_path, "pretrain") | own | push


def hides_the_token(folder: Path) -> bool:
    return not any(TOKEN.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_the_complete_folder_is_uploaded_and_nothing_else(flags, online, caplog, capfd):
    folder = train_here(flags)
    held = online.files["me/tiny-vlm", "main"]
    assert held == {name: (folder / name).read_bytes() for name in files_of(folder)}
    assert {"config.json", "model.safetensors", "tokenizer.json", PAGE, DIGESTS, "parameters.json"} <= set(held)
    beside = {path.name for path in folder.iterdir()} - set(held)
    assert {"checkpoint-1", "run.json", "trainer_state.json"} <= beside and not online.private["me/tiny-vlm"]
    ModelCard(held[PAGE].decode())
    printed = capfd.readouterr()
    assert hides_the_token(folder) and TOKEN not in caplog.text + printed.out + printed.err
    assert "/commit/abc" in caplog.text

    count = len([step for step in online.asked if "/commit/" in step])
    (folder / PAGE).write_text("# Mine\n")
    train_here(flags)  # has finished: it is uploaded again, with the page as it now is
    assert len([step for step in online.asked if "/commit/" in step]) == count + 1
    assert online.files["me/tiny-vlm", "main"][PAGE] == b"# Mine\n"


def test_flags_of_the_repository_act(online, tmp_path):
    made = Hub("org/other", TOKEN, private=True, revision="trial").prepared()
    assert made.repository == "org/other" and online.private == {"org/other": True}
    assert "POST /api/models/org/other/branch/trial" in online.asked
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "mine.txt").write_text("stays here")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    digest = file_digest(tmp_path / "model.safetensors")
    (tmp_path / DIGESTS).write_text(json.dumps({"sha256": {"model.safetensors": digest}}))
    made.upload(tmp_path)
    assert set(online.files["org/other", "trial"]) == {"model.safetensors", DIGESTS, "adapter/adapter_config.json"}
    with pytest.raises(UserError, match="--hub_private_repo False, but org/other exists and is private"):
        Hub("org/other", TOKEN, private=False).prepared()
    assert TOKEN not in repr(made)


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [
        ("hub_token", None, "--push_to_hub True: .*hf auth login"),
        ("hub_token", "hf_secret_of_nobody", "--push_to_hub True: .*Invalid user token.*hf auth login"),
        ("hub_token", READER, "--hub_model_id tiny-vlm .as me.: .*permission"),
        ("hub_model_id", "a/b/c", "--hub_model_id a/b/c .as me.: .*OWNER/NAME"),
    ],
)
def test_what_would_fail_at_the_end_is_told_before_anything_loads(flag, value, named, flags, online, monkeypatch):
    monkeypatch.setattr("moellava.train.train.begin", lambda *_: pytest.fail("the run has begun"))
    with pytest.raises(UserError, match=named) as caught:
        train_here(flags | {flag: value})
    assert "secret" not in str(caught.value)


def test_no_network_is_told_before_anything_loads(flags, online, monkeypatch, caplog):
    monkeypatch.setattr("moellava.train.train.begin", lambda *_: pytest.fail("the run has begun"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--push_to_hub True: .*HF_HUB_OFFLINE is set: unset it"):
        train_here(flags)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub_module.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(words_of(flags)) == 2
    assert "--push_to_hub True: " in caplog.text and "Is http://127.0.0.1:9 reached from here?" in caplog.text


def test_an_upload_that_fails_leaves_a_complete_folder(flags, online, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)  # between attempts
    online.refuses_commits = True
    with pytest.raises(UserError, match="is complete, but did not go to me/tiny-vlm: .*given again, uploads"):
        train_here(flags)
    online.refuses_commits = False
    train(*parse_arguments(words_of(flags)))
    assert "model.safetensors" in online.files["me/tiny-vlm", "main"]


def test_a_value_that_is_refused_is_not_shown_where_it_is_a_secret(flags):
    with pytest.raises(UserError, match="--hub_token …: needs --push_to_hub True") as caught:
        parse_arguments(words_of(flags | {"push_to_hub": False}))
    assert TOKEN not in str(caught.value)
    with pytest.raises(UserError, match="--hub_strategy all_checkpoints: .*--hub_strategy end"):
        parse_arguments(words_of(flags | {"hub_strategy": "all_checkpoints"}))
    parse_arguments(words_of(flags | {"hub_strategy": "end"}))


@pytest.mark.slow
def test_a_process_of_its_own_uploads_to_the_hub_that_its_environment_names(flags, online):
    own = {"HF_ENDPOINT": online.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = run_train(flags, env=own)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len([step for step in online.asked if "/commit/" in step]) == 1
    assert "model.safetensors" in online.files["me/tiny-vlm", "main"] and TOKEN not in done.stderr + done.stdout
