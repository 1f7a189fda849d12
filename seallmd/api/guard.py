"""Who may call a server that listens on this machine alone: no web page of somebody else's.

Owns the check of Host and Origin. Must not know what the routes do. Without it, a page in a browser on this
machine could point a name of its own at 127.0.0.1 (DNS rebinding) and use every model.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Middleware

from seallmd.api.cors import allows
from seallmd.api.problems import Handler
from seallmd.errors import RequestError

_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def names_this_machine(host: str) -> bool:
    """Whether a Host header names this machine as no page from elsewhere can be named."""
    return _name_of(f"//{host}") in _LOCAL_NAMES


def make_guard(host: str, origins: Collection[str] = ()) -> Middleware:
    """The middleware for a server that is configured to listen on `host`. origins: of pages that may call.

    Requests that came over loopback TCP must name this machine in Host and, if there is one, in Origin. A
    server that is configured to be reached from elsewhere has names that we cannot know: there, and on Unix
    sockets, which no web page reaches, everything passes.
    """
    guarded = is_loopback(host)
    allowed = _LOCAL_NAMES | {host.lower()}

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if guarded and _came_over_loopback(request):
            if _name_of(f"//{request.headers.get('Host', '')}") not in allowed:
                raise RequestError("this Host is not served here", status=403, code="forbidden_host")
            origin = request.headers.get("Origin")
            if origin is not None and _name_of(origin) not in allowed and not allows(origins, origin):
                raise RequestError(
                    "web pages of this Origin are refused", status=403, code="forbidden_origin"
                )
        return await handler(request)

    return guard


def _came_over_loopback(request: web.Request) -> bool:
    """By the socket's own address: an inherited one may listen elsewhere than the settings say."""
    transport = request.transport
    own = None if transport is None else transport.get_extra_info("sockname")
    return isinstance(own, tuple) and is_loopback(str(own[0]))


def _name_of(url: str) -> str:
    """The host of a URL, in lower case; empty when there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
