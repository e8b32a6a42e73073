# SPDX-License-Identifier: Apache-2.0
"""A language model that grades answers, behind any endpoint of OpenAI's API (`/v1/chat/completions`)."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from moellava.errors import UserError

URL_VARIABLE = "OPENAI_BASE_URL"
KEY_VARIABLE = "OPENAI_API_KEY"
"""Where OpenAI's own client looks, too. A key is read from the environment alone, and written nowhere."""

TRIES = 4
FIRST_PAUSE = 1.0
"""Seconds before the second try; twice as long before each further one."""

TRIED_AGAIN = {408, 409, 429, 500, 502, 503, 504}
"""Answers of a server that may be another one a moment later."""


@dataclass(frozen=True)
class Judge:
    """Who grades.

    Args:
        url: of the API, up to and with its version: http://127.0.0.1:8000/v1.
        model: its name there.
        at_once: texts that are asked side by side.
        max_tokens: of a reply.
        timeout: seconds that a reply may take.
    """

    url: str
    model: str
    at_once: int = 8
    max_tokens: int = 512
    timeout: float = 300.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"--judge-url {self.url}: an address that begins with http:// or https:// is needed.")

    @property
    def digest(self) -> str:
        """Tells judges apart, in the names of files."""
        return blake2b(f"{self.url} {self.model}".encode("utf-8", "backslashreplace"), digest_size=4).hexdigest()

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """What the judge says to each text. Raises UserError where it does not answer."""
        with ThreadPoolExecutor(self.at_once) as pool:
            return list(pool.map(self.ask, texts))

    def ask(self, text: str) -> str:
        """What it says to one text, at temperature 0. Raises UserError."""
        body = {"model": self.model, "messages": [{"role": "user", "content": text}]}
        reply = self._post({**body, "temperature": 0, "max_tokens": self.max_tokens})
        try:
            said = reply["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"--judge-url {self.url}: no reply of a chat: {json.dumps(reply)[:200]}") from error
        return said or ""

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        problem = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
            request = urllib.request.Request(address, json.dumps(body).encode(), headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.reason}: {error.read().decode(errors='replace')[:200]}"
                if error.code not in TRIED_AGAIN:
                    break
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = str(error) or type(error).__name__
        raise UserError(f"--judge-url {self.url}: {self.model} does not answer: {problem}")
