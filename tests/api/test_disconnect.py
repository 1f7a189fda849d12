"""Clients that leave, or read slowly: nothing is generated for nobody, and nobody else waits."""

from __future__ import annotations

import asyncio
import json
import socket
import struct

import pytest
from openai import AsyncOpenAI

from seallmd.api import serving
from tests.api.engine_double import SPOKEN, FakeEngine


async def open_request(port: int, **fields: object) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a completion request and leave the answer unread."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"model": "m", "prompt": "x", "max_tokens": 150, "ignore_eos": True, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    return reader, writer


def hang_up(writer: asyncio.StreamWriter, how: str) -> None:
    if how == "RST":
        peer = writer.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    elif how == "FIN":
        writer.close()
    else:
        writer.write_eof()


@pytest.mark.parametrize("how", ["FIN", "RST", "half-close"])
@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_while_queued(port: int, engine: FakeEngine, how: str, stream: bool) -> None:
    """No token has come yet, nothing was written to the client: its leaving must be noticed all the same."""
    engine.pause()
    _reader, writer = await open_request(port, stream=stream, n=3)
    await engine.arrived.wait()
    assert len(engine.live) == 3
    hang_up(writer, how)
    await engine.idle.wait()
    assert sorted(engine.cancelled) == [1, 2, 3]
    writer.close()


@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_leaving_in_mid_stream(port: int, engine: FakeEngine, how: str) -> None:
    """A client that has read some tokens leaves: the rest is not generated."""
    reader, writer = await open_request(port, stream=True)
    await reader.readuntil(b"data: ")
    engine.pause()
    hang_up(writer, how)
    await engine.idle.wait()
    assert engine.cancelled == [1]


async def test_leaving_before_anything_starts(port: int, engine: FakeEngine) -> None:
    """A client that leaves while its model is still examined never reaches the engine."""
    looked = asyncio.Event()
    service = engine.service

    def watched(name: str) -> object:
        looked.set()
        return service(name)

    engine.service = watched  # type: ignore[method-assign,assignment]
    reader, writer = await open_request(port, model="young")
    await looked.wait()
    writer.write_eof()
    assert await reader.read() == b""  # the server has ended the connection, and with it the handler
    writer.close()
    assert engine.submitted == []


async def test_openai_client_that_stops_reading(client: AsyncOpenAI, engine: FakeEngine) -> None:
    """`break` out of the client's loop and close: what people do."""
    stream = await client.completions.create(
        model="m", prompt="x", max_tokens=150, stream=True, extra_body={"ignore_eos": True}
    )
    async for _chunk in stream:
        engine.pause()
        break
    await stream.close()
    await engine.idle.wait()
    assert engine.cancelled == [1]


async def test_slow_reader_blocks_nobody(port: int, client: AsyncOpenAI, engine: FakeEngine) -> None:
    """While one client reads nothing, others are served; its tokens wait in the bounded stream."""
    _reader, writer = await open_request(port, stream=True)
    await engine.idle.wait()
    answer = await client.completions.create(model="m", prompt="x", max_tokens=100)
    assert answer.choices[0].text == SPOKEN
    writer.close()


@pytest.mark.parametrize("path", ["/v1/completions", "/api/chat"])
async def test_a_body_that_does_not_come(port: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends a part of its body and no more is told, and its connection ends."""
    monkeypatch.setattr(serving, "_BODY_SECONDS", 0.01)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f'POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{{"mod'.encode())
    answer = await reader.readuntil(b"\r\n\r\n")
    assert b" 408 " in answer.splitlines()[0]
    writer.write_eof()
    assert b"stalled" in await reader.read()
    writer.close()
