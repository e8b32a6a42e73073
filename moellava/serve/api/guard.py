# SPDX-License-Identifier: Apache-2.0
"""What stands before every route, the page's included: who may ask, from where, and how much a request may bring."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from moellava.serve.api.refusals import Refusal, refusal_json

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CHALLENGE = {"WWW-Authenticate": 'Basic realm="moellava", charset="UTF-8"'}
"""Has a browser ask for a password, which is the key; the user's name is free."""

DRAINED = 4
"""Bodies that are too large are read to their end, so that the client reads the answer, up to so many times the
limit."""


class Guard:
    """Refuses what must not reach a route. See `problem`.

    Args:
        app: what is guarded.
        api_key: what clients have to bring; None: nothing.
        body_bytes: the largest body.
        is_local: whether the server listens to this machine alone.
    """

    def __init__(self, app: App, api_key: str | None, body_bytes: int, is_local: bool):
        self.app, self.api_key, self.body_bytes, self.is_local = app, api_key, body_bytes, is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            if scope["type"] == "websocket":
                raise Refusal("There are no websockets here.", 404)
            self.require(headers)
        except Refusal as refusal:
            status, body = refusal_json(refusal)
            await self._drain(headers, receive)
            await JSONResponse(body, status, CHALLENGE if status == 401 else None)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def require(self, headers: Mapping[str, str]) -> None:
        """Raises Refusal for a request

        * without the key, as `Authorization: Bearer KEY` or as the password of HTTP's Basic scheme (401);
        * of another site's page, which a browser would send in its user's name (403);
        * for a name that is not this machine's, where it listens to itself alone and asks for no key: a page of the
          web whose name leads here would be taken for our own (403);
        * with a body that is too large (413), or does not say how large it is (411).
        """
        if self.api_key is not None and not _is_key(headers.get("authorization", ""), self.api_key):
            raise Refusal("The API key is missing or wrong: Authorization: Bearer KEY", 401)
        host = headers.get("host", "")
        if self.api_key is None and self.is_local and not is_loopback(_name_of(host)):
            raise Refusal(f"This server answers to localhost, not to {host[:80]!r}.", 403)
        origin = headers.get("origin")
        if origin is not None and urlsplit_or_none(origin) != host:
            raise Refusal("A page of another site may not ask here.", 403)
        if "transfer-encoding" in headers:
            raise Refusal("A body has to say its size: Content-Length.", 411)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self.body_bytes:
            raise Refusal(f"The body has {length[:20]} bytes, and this server takes {self.body_bytes}.", 413)

    async def _drain(self, headers: Mapping[str, str], receive: Receive) -> None:
        length = headers.get("content-length", "")[:20]
        if length.isdecimal() and 0 < int(length) <= DRAINED * self.body_bytes:
            while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                pass


def _is_key(authorization: str, key: str) -> bool:
    """Whether a header brings the key. Takes as long for a key that is nearly right."""
    scheme, _, value = authorization.partition(" ")
    given = value.strip().encode("utf-8", errors="replace")
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(given, key.encode())


def urlsplit_or_none(url: str) -> str | None:
    """The host and port of a URL; None where it has none."""
    try:
        return urlsplit(url).netloc or None
    except ValueError:
        return None


def _name_of(host: str) -> str:
    """A `Host` header without its port and the brackets of IPv6."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself, as it calls itself."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
