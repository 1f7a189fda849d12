"""Who may call what: a key for every path that was not opened, and limits told in headers.

Owns the check of Authorization and the x-ratelimit headers. Must not know how keys are kept (`keys`) or
counted (`rates`). Deny is the default: a route that somebody adds needs a key without being listed anywhere.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection

from aiohttp import web
from aiohttp.typedefs import Middleware

from seallmd.api.keys import Key, Keyring, current_key
from seallmd.api.problems import Handler
from seallmd.api.rates import Rates
from seallmd.errors import RequestError

_SCHEME = "bearer"
_KEY: web.RequestKey[Key] = web.RequestKey("seallmd_key", Key)


def make_access(keyring: Keyring, open_paths: Collection[str]) -> Middleware:
    """The middleware. open_paths: exactly these need no key."""

    @web.middleware
    async def access(request: web.Request, handler: Handler) -> web.StreamResponse:
        # A connection's requests share a context: what the one before left must not count.
        current_key.set(None)
        if keyring.required and request.path not in open_paths:
            key = keyring.find(_presented(request))
            if key is None:
                raise RequestError(
                    "this needs an API key that is known here", status=401, code="invalid_api_key"
                )
            request[_KEY] = key
            current_key.set(key)
        return await handler(request)

    return access


def make_rate_headers(rates: Rates) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """Tells clients what is left of their key's limits, in OpenAI's headers; for `on_response_prepare`."""

    async def tell(request: web.Request, response: web.StreamResponse) -> None:
        if response.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        key = request.get(_KEY)
        for what, (limit, left) in (rates.left(key) if key is not None else {}).items():
            response.headers[f"x-ratelimit-limit-{what}"] = str(limit)
            response.headers[f"x-ratelimit-remaining-{what}"] = str(left)

    return tell


def _presented(request: web.Request) -> str:
    """What the client says in Authorization; empty when that is no bearer token."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == _SCHEME else ""
