"""How a stream looks on the wire: server-sent events, or one JSON document per line.

Owns framing, keep-alive comments and the moment at which headers go out. Must not know what is streamed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import TypeVar

import msgspec
from aiohttp import web

from seallmd.api.problems import INTERNAL, error_body, error_event, ollama_error_body
from seallmd.errors import RequestError

_log = logging.getLogger(__name__)

Item = TypeVar("Item")


class Wire(msgspec.Struct, frozen=True):
    """One way to frame a stream. ping: what keeps a silent connection open, empty = nothing does.

    encode: what is sent of an object, between `before` and `after`.
    """

    content_type: str
    before: bytes
    after: bytes
    end: bytes
    ping: bytes
    error: Callable[[RequestError], bytes]
    encode: Callable[[object], bytes] = msgspec.json.encode

    def frame(self, body: bytes) -> bytes:
        """One document as it is sent."""
        return self.before + body + self.after


def named_event(event: object) -> bytes:
    """An event under the name that it carries as `type`, as /v1/responses has them."""
    assert isinstance(event, dict)
    return b"event: " + str(event["type"]).encode() + b"\ndata: " + msgspec.json.encode(event)


EVENTS = Wire(
    "text/event-stream; charset=utf-8",
    b"data: ",
    b"\n\n",
    b"data: [DONE]\n\n",
    b": keep-alive\n\n",
    error_body,
)
NAMED_EVENTS = Wire(
    "text/event-stream; charset=utf-8",
    b"",
    b"\n\n",
    b"",
    b": keep-alive\n\n",
    lambda error: named_event(error_event(error)),
    named_event,
)
LINES = Wire("application/x-ndjson", b"", b"\n", b"", b"", ollama_error_body)


async def with_pings(source: AsyncIterator[Item], seconds: float) -> AsyncGenerator[Item | None, None]:
    """The items, and None whenever none has come for so long. seconds: 0 = never."""
    if not seconds:
        async for piece in source:
            yield piece
        return

    async def step() -> Item | None:
        return await anext(source, None)

    task = asyncio.create_task(step())
    try:
        while True:
            done, _ = await asyncio.wait((task,), timeout=seconds)
            if not done:
                yield None
                continue
            item = task.result()
            if item is None:
                return
            task = asyncio.create_task(step())
            yield item
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def send_stream(
    request: web.Request,
    documents: AsyncIterator[bytes],
    wire: Wire,
    ping_seconds: float = 0.0,
    write_seconds: float | None = None,
) -> web.StreamResponse:
    """Send documents as they come.

    Headers wait for the first one, so that an earlier failure has a status of its own; or for the first ping,
    after which a failure can only be a document. ping_seconds: 0 = no pings. write_seconds: how long a client
    may take nothing before its connection is cut, and with it its request; None = for ever.
    """
    async with contextlib.aclosing(with_pings(documents, ping_seconds if wire.ping else 0.0)) as parts:
        first = await anext(parts)
        response = web.StreamResponse(headers=_headers(wire))

        async def write(data: bytes) -> None:
            await hurry(response.write(data))

        async def hurry(writing: Awaitable[None]) -> None:
            try:
                async with asyncio.timeout(write_seconds):
                    await writing
            except TimeoutError:
                _log.info("a client that does not read its stream is cut off")
                if request.transport is not None:
                    request.transport.abort()
                raise ConnectionError("the client does not read") from None

        # A client that leaves is no failure: there is nobody left to tell.
        with contextlib.suppress(ConnectionError):
            await response.prepare(request)
            await write(_framed(first, wire))
            try:
                async for part in parts:
                    await write(_framed(part, wire))
            except RequestError as error:
                await write(wire.frame(wire.error(error)))
            except ConnectionError:
                raise
            except Exception:  # noqa: BLE001 - headers are sent: the middleware could not answer any more
                _log.exception("%s failed in mid-stream", request.path)
                await write(wire.frame(wire.error(INTERNAL)))
            if wire.end:
                await write(wire.end)
            await hurry(response.write_eof())  # it waits for what was written before, too
        return response


def _framed(part: bytes | None, wire: Wire) -> bytes:
    return wire.ping if part is None else wire.frame(part)


def _headers(wire: Wire) -> dict[str, str]:
    return {
        "Content-Type": wire.content_type,
        "Cache-Control": "no-cache",
        "X-Accel-Buffering": "no",  # or nginx collects the stream
    }
