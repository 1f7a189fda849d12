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
    "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
    "Access-Control-Max-Age": "600",
}
_HEADERS = "Access-Control-Request-Headers"


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
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return await handler(request)
        # Clients have headers of their own (OpenAI's tells its version, and what not):
        # whichever a page that may call wants to send is as good as another.
        headers = request.headers.get(_HEADERS, "")
        return web.Response(status=204, headers={**_ALLOWED, "Access-Control-Allow-Headers": headers})

    return cors


async def tell_origin(origins: Collection[str], request: web.Request, response: web.StreamResponse) -> None:
    """Let the page read the response, errors and streams included; for `on_response_prepare`."""
    origin = request.headers.get("Origin")
    if origin is not None and allows(origins, origin):
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Vary"] = "Origin"
        response.headers["Access-Control-Expose-Headers"] = "Retry-After, x-should-retry"
