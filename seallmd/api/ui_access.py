"""Who may change something from the page, and what is certain about the request.

Owns the checks of the page's state-changing routes. Must not know what they do. Whoever reaches HTTP reaches
the page; operating the daemon from it takes more.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from aiohttp import web

from seallmd.api.guard import is_loopback, names_this_machine
from seallmd.api.keys import current_key
from seallmd.errors import RequestError

# No form and no image can send it, and scripts of other pages may not: that would take CORS.
PAGE_HEADER = "X-Seallmd-Page"
_PROXIES = ("Forwarded", "X-Forwarded-For", "X-Real-IP")


def why_not_operator(request: web.Request) -> str:
    """Why whoever sent this may not operate the daemon; empty when they may.

    Once there are keys, it takes one with `admin`. Without any, it takes a browser on this machine: a TCP
    connection over loopback (behind a Unix socket there is a proxy), to a name of loopback (any other may be
    somebody's who points it here, DNS rebinding), and no trace of a proxy.
    """
    key = current_key.get()
    if key is not None:
        return "" if key.admin else "Models are loaded and evicted with an API key that has admin = true."
    peer = None if request.transport is None else request.transport.get_extra_info("peername")
    near = isinstance(peer, tuple) and is_loopback(str(peer[0]))
    named = names_this_machine(request.headers.get("Host", ""))
    if near and named and not any(name in request.headers for name in _PROXIES):
        return ""
    return "Models are loaded and evicted by a browser on the machine itself, at localhost, without a proxy."


def require_operator(request: web.Request) -> None:
    """Let a state-changing request of the page pass. Raises RequestError (403)."""
    require_own_page(request)
    if reason := why_not_operator(request):
        raise RequestError(reason, status=403, code="not_operator")


def require_own_page(request: web.Request) -> None:
    """The request was made by our own page, not by another in the same browser. Raises RequestError (403)."""
    origin = request.headers.get("Origin")
    elsewhere = origin is not None and _authority(origin) != request.headers.get("Host", "").lower()
    site = request.headers.get("Sec-Fetch-Site", "same-origin")
    if elsewhere or site not in ("same-origin", "none") or request.headers.get(PAGE_HEADER) != "1":
        raise RequestError("this is for the page at /ui alone", status=403, code="forbidden_origin")


def _authority(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
