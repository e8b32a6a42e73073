# SPDX-License-Identifier: Apache-2.0
"""`moellava serve`: flags that are refused, and a server of its own process that is asked and told to end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from openai import OpenAI

from moellava.cli import main
from moellava.commands import serve
from moellava.data.embedded import data_uri

REFUSED = {
    "--host 0.0.0.0": "whoever reaches this machine could ask",
    "--api-key=": "The API key is empty",
    "--api-key=ä": "letters that no header carries",
    "--port 99999": "--port 99999: ports go from 0",
    "--port -1": "--port -1: ports go from 0",
    "--host no.such.host.invalid --api-key k": "--host no.such.host.invalid",
    "--max-requests 0": "--max-requests: 0: a whole number from 1 on",
    "--max-body-mb nan": "--max-body-mb: nan",
    "--batch-size 9 --max-requests 8": "--batch-size 9: no more than --max-requests 8",
    "--allow-domain https://example.com": "--allow-domain https://example.com: give hosts alone",
    "--model-path nowhere": "nowhere",
}
"""Flags, and words of the refusal."""


@pytest.mark.parametrize("flags", REFUSED)
def test_flags_that_cannot_be_are_named(flags, capsys, monkeypatch):
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    try:
        status = main(["serve", "--model-path", "nowhere", *flags.split()])
    except SystemExit as leaving:  # argparse
        status = leaving.code
    assert status == 2 and REFUSED[flags] in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--model-path", "nowhere", "--port", port]) == 2
    assert f"--port {port}: " in capsys.readouterr().err


def test_two_keys_are_one_too_many(capsys, monkeypatch):
    monkeypatch.setenv(serve.KEY_VARIABLE, "one")
    assert main(["serve", "--model-path", "nowhere", "--api-key", "two"]) == 2
    assert f"{serve.KEY_VARIABLE} is set" in capsys.readouterr().err


def test_what_is_not_installed_is_named(capsys, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "gradio" else name)
    assert main(["serve", "--model-path", "nowhere"]) == 2
    assert "needs gradio: pip install 'moellava[serve]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_answers_until_it_is_told_to_end(taught_folder, pictures):
    command = [sys.executable, "-m", "moellava.cli", "serve", "--model-path", taught_folder, "--port", "0"]
    environment = os.environ | {serve.KEY_VARIABLE: "a-key"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            line = process.stdout.readline()
            name, url = re.fullmatch(r"(\S+): (http://127\.0\.0\.1:\d+/v1), and a page at .*\n", line).groups()
            client = OpenAI(base_url=url, api_key="a-key", timeout=60)
            for colour, picture in zip(("red", "green", "blue"), pictures, strict=True):
                shown = {"type": "image_url", "image_url": {"url": data_uri(picture.read_bytes())}}
                content = [shown, {"type": "text", "text": "what colour is it?"}]
                said = client.chat.completions.create(model=name, messages=[{"role": "user", "content": content}])
                assert said.choices[0].message.content == colour
                assert said.choices[0].finish_reason == "stop"
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
