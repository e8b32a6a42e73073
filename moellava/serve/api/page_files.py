# SPDX-License-Identifier: Apache-2.0
"""Files that Gradio would fetch: where a client writes a URL for an upload, its server downloads it. Refused here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from moellava.serve.api.guard import App, Receive, Scope, Send
from moellava.serve.api.refusals import Refusal, refusal_json
from moellava.serve.api.remote import is_remote

OURS = "/gradio_api/upload"
"""The one route of Gradio whose body is the files themselves."""


class LocalFiles:
    """Refuses bodies that name a file of the web.

    Args:
        app: what is guarded.
    """

    def __init__(self, app: App):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        path = scope.get("path", "")
        if scope["type"] != "http" or scope["method"] != "POST" or path.startswith("/v1/") or path.startswith(OURS):
            await self.app(scope, receive, send)
            return
        try:
            body = await Request(scope, receive).body()
            content = json.loads(body or b"null")
            named = any(is_remote(text) for text in _paths_in(content))
        except ClientDisconnect:
            return
        except (ValueError, RecursionError):
            named = False
            body = b"null"  # nobody reads it otherwise than we did
        if named:
            status, refusal = refusal_json(Refusal("The page takes uploads, and fetches nothing from the web.", 403))
            await JSONResponse(refusal, status)(scope, receive, send)
            return
        await self.app(scope, _replaying(body, receive), send)


def _paths_in(content: Any) -> Iterator[str]:
    """All texts that stand where a file's path does. (Its `url` is where the page shows it, and is not read.)"""
    if isinstance(content, list):
        for one in content:
            yield from _paths_in(one)
    elif isinstance(content, dict):
        for name, one in content.items():
            if isinstance(one, str) and name == "path":
                yield one
            else:
                yield from _paths_in(one)


def _replaying(body: bytes, receive: Receive) -> Receive:
    """`receive` that gives a body that was read already, and then goes on."""
    given = False

    async def replay() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
