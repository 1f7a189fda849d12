"""Which web pages may call from a browser: none, unless the operator names their origins.

Owns the CORS headers and the answer to preflights. Must not know what the routes do.
"""

from __future__ import annotations

from collections.abc import Collection

from aiohttp import web
from aiohttp.typedefs import Middleware

from seallmd.api.problems import Handler

ANY = "*"
_ALLOWED = {
    "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
    "Access-Control-Allow-Headers": "Authorization, Content-Type",
    "Access-Control-Max-Age": "600",
}


def allows(origins: Collection[str], origin: str) -> bool:
    """Whether pages of an origin may call."""
    return ANY in origins or origin in origins


def make_cors(origins: Collection[str]) -> Middleware:
    """The middleware. origins: such as "https://chat.example.org"; empty = nothing is ever allowed."""

    @web.middleware
    async def cors(request: web.Request, handler: Handler) -> web.StreamResponse:
        origin = request.headers.get("Origin")
        if origin is None or not allows(origins, origin):
            return await handler(request)
        preflight = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        return web.Response(status=204, headers=_ALLOWED) if preflight else await handler(request)

    return cors


async def tell_origin(origins: Collection[str], request: web.Request, response: web.StreamResponse) -> None:
    """Let the page read the response, errors and streams included; for `on_response_prepare`."""
    origin = request.headers.get("Origin")
    if origin is not None and allows(origins, origin):
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Vary"] = "Origin"
        response.headers["Access-Control-Expose-Headers"] = "Retry-After, x-should-retry"
