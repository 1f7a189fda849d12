"""Keep-alive comments in streams that are silent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest
from openai import APIError, AsyncOpenAI

from seallmd.api.server import start_http
from seallmd.api.settings import HttpSettings
from seallmd.api.wire import with_pings
from seallmd.core.events import Finish
from tests.api.engine_double import SPOKEN, FakeEngine

BODY = {"model": "m", "prompt": "x", "max_tokens": 100, "stream": True}
PING = b": keep-alive\n\n"


@pytest.fixture
async def pinging(engine: FakeEngine) -> AsyncIterator[str]:
    """The URL of a server that hardly waits before it pings."""
    runner = await start_http(engine, HttpSettings(port=0, ping_seconds=0.01))
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_silence_is_filled(pinging: str, engine: FakeEngine) -> None:
    """While the request waits, comments come; then the stream as ever."""
    engine.pause()
    async with (
        aiohttp.ClientSession() as session,
        session.post(pinging + "/v1/completions", json=BODY) as response,
    ):
        assert response.status == 200
        assert await response.content.readexactly(2 * len(PING)) == 2 * PING
        engine.resume()
        events = [part for part in (await response.text()).split("\n\n") if part.startswith("data: {")]
    text = "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events)
    assert text == SPOKEN


async def test_clients_ignore_comments(pinging: str, engine: FakeEngine) -> None:
    """The official client sees tokens alone; a failure after the first comment is an event."""
    engine.pause()
    async with AsyncOpenAI(base_url=f"{pinging}/v1", api_key="none", max_retries=0) as client:
        # Returns once the headers are here, which only a comment can have brought.
        stream = await client.completions.create(**BODY)  # type: ignore[call-overload]
        engine.resume()
        assert "".join([part.choices[0].text async for part in stream]) == SPOKEN
        engine.pause()
        engine.failing = Finish(0, "failed", "the worker died", "worker_lost", 503)
        stream = await client.completions.create(**BODY)  # type: ignore[call-overload]
        engine.resume()
        with pytest.raises(APIError, match="the worker died"):
            await anext(aiter(stream))


async def test_leaving_while_pinged(pinging: str, engine: FakeEngine) -> None:
    """A client that leaves a waiting stream is noticed, and its request cancelled."""
    engine.pause()
    async with aiohttp.ClientSession() as session:
        async with session.post(pinging + "/v1/completions", json=BODY) as response:
            await response.content.readexactly(len(PING))
            response.close()
        await engine.idle.wait()
    assert engine.cancelled == [1]


async def test_off_by_default(url: str, engine: FakeEngine) -> None:
    """Without pings a request that never began keeps its real status."""
    engine.failing = Finish(0, "failed", "no room", "overloaded", 503)
    async with (
        aiohttp.ClientSession() as session,
        session.post(url + "/v1/completions", json=BODY) as response,
    ):
        assert response.status == 503


async def test_source_is_closed() -> None:
    """Whoever stops listening leaves no task behind that waits for the next item."""
    closed = asyncio.Event()

    async def source() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            closed.set()

    parts = with_pings(source(), 0.001)
    assert [await anext(parts), await anext(parts)] == [1, None]
    await parts.aclose()
    assert closed.is_set()
