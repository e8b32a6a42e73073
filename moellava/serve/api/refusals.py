# SPDX-License-Identifier: Apache-2.0
"""What a client is told of a request that is not answered: a status, a message without addresses or paths, OpenAI's
JSON around it."""

from __future__ import annotations

import re
from typing import Any

from moellava.errors import UserError
from moellava.log import printable

ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{4,}\b")
"""Where an object lies in memory."""

PATH = re.compile(r"(?<![\w/:.~<])(?:~|\.{1,2})?/[^\s'\"<>|,;:()]+|\b[A-Za-z]:\\[^\s'\"<>|,;]+")
"""A file of the server, absolute or from the current folder on; `image/png` and URLs are none."""

LONGEST = 500
"""Characters of a message that are sent."""

UNEXPECTED = "The server failed at this request. Its log says why."

SORTS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""Status -> OpenAI's `type`; other refusals are 'invalid_request_error', and failures of ours 'server_error'."""


class Refusal(UserError):
    """A request that is refused for a reason of its own.

    Args:
        message: what is wrong, both sides of it, and the way out.
        status: of HTTP.
        param: the field of the request's body.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None):
        super().__init__(message)
        self.status = status
        self.param = param


def public(text: object) -> str:
    """A message as a client may read it: without addresses in memory and paths, cut, and without control characters."""
    text = PATH.sub("…", ADDRESS.sub("…", str(text)))
    return printable(text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…")


def error_json(message: object, status: int, param: str | None = None) -> dict[str, Any]:
    """The body of a refusal, as OpenAI's clients read it."""
    sort = SORTS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": public(message), "type": sort, "param": param, "code": status}}


def refusal_json(error: UserError) -> tuple[int, dict[str, Any]]:
    """(status, body) for a request that cannot be answered."""
    status, param = getattr(error, "status", 400), getattr(error, "param", None)
    return status, error_json(error, status, param)
