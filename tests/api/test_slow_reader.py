"""A client that does not read its stream is bounded, and cut off in the end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

from aiohttp import web

from seallmd.api.wire import EVENTS, send_stream


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

    async def stream(request: web.Request) -> web.StreamResponse:
        return await send_stream(request, documents(), EVENTS, write_seconds=0.1)

    async def hello(_request: web.Request) -> web.Response:
        return web.Response(text="hello")

    app = web.Application()
    app.add_routes([web.get("/stream", stream), web.get("/hello", hello)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    with socket.create_connection(("127.0.0.1", port)) as idle:
        idle.sendall(b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await closed.wait()
        assert made < 500
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /hello HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b"hello" in await reader.read()
        writer.close()
    await runner.cleanup()
