# SPDX-License-Identifier: Apache-2.0
"""A server's answers to the questions of `own_answers.py`, by OpenAI's API. Needs nothing installed.

    python scripts/checks/serve_answers.py --url http://127.0.0.1:8000 --pid PID --model-path DIR \\
        --asked OWN.json --output FILE

Waits until the server is up, or its process has ended. `transformers serve` tells texts and lengths, but no tokens and
no log probabilities.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

from asked import messages, read_answers

STARTS = 180
ANSWERS = 300
"""Seconds that a server may take to start, and to answer; the first answer loads the model."""


def wait_for(url: str, pid: int) -> None:
    """Returns once the server answers. Raises ProcessLookupError if it has ended, TimeoutError if it is too slow."""
    until = time.monotonic() + STARTS
    while time.monotonic() < until:
        os.kill(pid, 0)  # no signal: only asks whether there is such a process
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    raise TimeoutError(f"{url} does not answer after {STARTS} s.")


def answered(url: str, model: str, answer: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    """One answer of the server's."""
    body = {"model": model, "messages": messages(answer), "temperature": 0, "max_tokens": max_tokens}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=ANSWERS) as response:
        said = json.load(response)
    return {"text": said["choices"][0]["message"]["content"].strip(), "length": said["usage"]["completion_tokens"]}


def main() -> None:
    """Writes the answers."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--url", required=True, help="of the server")
    flags.add_argument("--pid", type=int, required=True, help="of the server's process")
    flags.add_argument("--model-path", required=True, help="the model as the server knows it")
    flags.add_argument("--asked", required=True, help="JSON file of own_answers.py")
    flags.add_argument("--output", type=Path, required=True, help="JSON file")
    args = flags.parse_args()
    asked = read_answers(args.asked)
    wait_for(args.url, args.pid)
    written = {
        "engine": "transformers serve",
        "model": args.model_path,
        "versions": {name: version(name) for name in ("transformers", "torch", "fastapi")},
        "answers": [answered(args.url, args.model_path, one, asked["max_tokens"]) for one in asked["answers"]],
    }
    args.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
