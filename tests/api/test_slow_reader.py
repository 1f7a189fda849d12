"""A client that does not read its stream is bounded, and cut off in the end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable

import pytest
from aiohttp import web

from seallmd.api.wire import EVENTS, send_stream

GET_STREAM = b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n"


@contextlib.asynccontextmanager
async def serving(documents: Callable[[], AsyncIterator[bytes]]) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """The port of a server that streams documents at /stream, and whether a stream is over."""
    over = asyncio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        try:
            return await send_stream(request, documents(), EVENTS, write_seconds=0.1)
        finally:
            over.set()

    async def hello(_request: web.Request) -> web.Response:
        return web.Response(text="hello")

    app = web.Application()
    app.add_routes([web.get("/stream", stream), web.get("/hello", hello)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield runner.addresses[0][1], over
    await runner.cleanup()


async def test_a_client_that_reads_nothing_is_cut_off() -> None:
    """What was made for it is little more than the sockets hold; its source is closed; others are served."""
    made, closed = 0, asyncio.Event()

    async def documents() -> AsyncIterator[bytes]:
        nonlocal made
        try:
            while True:
                made += 1
                yield b"x" * (1 << 16)
        finally:
            closed.set()

    async with serving(documents) as (port, _):
        with socket.create_connection(("127.0.0.1", port)) as idle:
            idle.sendall(GET_STREAM)
            await closed.wait()
            assert made < 500
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /hello HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert b"hello" in await reader.read()
            writer.close()


async def test_a_client_that_does_not_take_the_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end waits for what the sockets did not take before: without a limit, the request would never be
    over, nor what its key has at a time."""

    async def wait(_response: web.StreamResponse, _data: bytes = b"") -> None:
        monkeypatch.undo()
        await asyncio.Event().wait()

    async def documents() -> AsyncIterator[bytes]:
        yield b"x"

    monkeypatch.setattr(web.StreamResponse, "write_eof", wait)
    async with serving(documents) as (port, over):
        with socket.create_connection(("127.0.0.1", port)) as idle:
            idle.sendall(GET_STREAM)
            await over.wait()
