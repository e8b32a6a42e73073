# SPDX-License-Identifier: Apache-2.0
"""Pictures from the web: refused, but for the hosts that the server's owner has named."""

from __future__ import annotations

from urllib.parse import urlsplit

import httpx

from moellava.data.embedded import data_uri
from moellava.serve.api.limits import ServerLimits
from moellava.serve.api.refusals import Refusal

SECONDS = 10.0
"""How long a host may take to connect, and between two pieces of its answer."""

SCHEMES = ("http", "https")


def is_remote(url: str) -> bool:
    """Whether a URL names something on another machine."""
    return url[:8].lower().startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def fetched(url: str, limits: ServerLimits) -> str:
    """A picture of the web as a data URI. Redirects are not followed: they would lead to hosts that nobody has named.

    Raises:
        Refusal: a host that is not allowed, another status than 200, or more bytes than a request may bring.
    """
    host = _allowed_host(url, limits)
    try:
        with httpx.stream("GET", url, follow_redirects=False, timeout=SECONDS) as response:
            if response.status_code != httpx.codes.OK:
                raise Refusal(f"{host} answers with status {response.status_code}, and redirects are not followed.")
            content = bytearray()
            for piece in response.iter_bytes():
                content += piece
                if len(content) > limits.body_bytes:
                    raise Refusal(f"The picture of {host} has more than {limits.body_bytes} bytes.", 413)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Refusal(f"The picture of {host} cannot be fetched: {type(error).__name__}.") from error
    return data_uri(bytes(content))


def _allowed_host(url: str, limits: ServerLimits) -> str:
    """The host of a URL, with its port where it names one. Raises Refusal where the server's owner has not named it so;
    a URL with a user in it is never so."""
    try:
        host = urlsplit(url).netloc.lower()
    except ValueError as error:
        raise Refusal("image_url is no URL that can be read.", param="messages") from error
    if host not in limits.domains:
        allowed = ", ".join(sorted(limits.domains)) or "none: send pictures as data URIs"
        raise Refusal(f"Pictures of {host[:80]!r} are not fetched; --allow-domain allows {allowed}.", param="messages")
    return host
