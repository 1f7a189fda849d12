"""Errors as clients see them: OpenAI's shape for every failure of the HTTP side, Ollama's below /api/.

Owns the error body, the headers that steer clients' retries, and the middleware that turns exceptions into
responses. Must not know what the endpoints do.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from seallmd.errors import RequestError

_log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

OLLAMA_PREFIX = "/api/"
INTERNAL = RequestError("the server failed on this request", status=500, code="internal_error")
_MAX_MESSAGE_CHARACTERS = 1000
_HTTP_TEXTS = {
    404: "there is no such path",
    405: "this path does not take this method",
    413: "the request's body is too large",
}


def error_body(error: RequestError) -> bytes:
    """{"error": {"message", "type", "param", "code"}} as JSON."""
    if error.status == 429:
        kind = "rate_limit_error"
    else:
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
    message = str(error)[:_MAX_MESSAGE_CHARACTERS]
    fields = {"message": message, "type": kind, "param": error.param, "code": error.code}
    return msgspec.json.encode({"error": fields})


def error_event(error: RequestError) -> dict[str, object]:
    """The same as an event of /v1/responses."""
    message = str(error)[:_MAX_MESSAGE_CHARACTERS]
    return {"type": "error", "code": error.code, "message": message, "param": error.param}


def ollama_error_body(error: RequestError) -> bytes:
    """{"error": "..."} as JSON."""
    return msgspec.json.encode({"error": str(error)[:_MAX_MESSAGE_CHARACTERS]})


def error_response(error: RequestError, path: str = "") -> web.Response:
    """The whole response, in the shape that clients of `path` expect.

    openai-python retries 429 and 5xx by itself: tell it when, or not to.
    """
    headers = {}
    if error.retry_after is not None:
        headers = {"Retry-After": str(max(1, math.ceil(error.retry_after))), "x-should-retry": "true"}
    elif error.status == 429 or error.status >= 500:
        headers = {"x-should-retry": "false"}
    body = ollama_error_body(error) if path.startswith(OLLAMA_PREFIX) else error_body(error)
    return web.Response(status=error.status, body=body, content_type="application/json", headers=headers)


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give every failure OpenAI's shape. What is not expected is logged once and told nobody."""
    try:
        return await handler(request)
    except RequestError as error:
        return error_response(error, request.path)
    except web.HTTPException as error:
        return _from_http(error, request.path)
    except ConnectionError:
        raise  # the client has left; aiohttp ends the connection
    except Exception:  # noqa: BLE001 - the edge of the process: a client gets an answer, the log the reason
        _log.exception("%s %s failed", request.method, request.path)
        return error_response(INTERNAL, request.path)


def _from_http(error: web.HTTPException, path: str) -> web.Response:
    """aiohttp's own refusals."""
    text = _HTTP_TEXTS.get(error.status, error.reason)
    response = error_response(RequestError(text, status=error.status), path)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response
