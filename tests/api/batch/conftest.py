"""A server with files and batches over the stand-in, and ways to wait for what happens there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from openai import AsyncOpenAI
from openai.types import Batch

from seallmd.api.batch.store import Store
from seallmd.api.keys import Keyring
from seallmd.api.server import BATCHES, start_http
from seallmd.api.settings import BatchSettings, HttpSettings
from tests.api.engine_double import FakeEngine

CHAT = "/v1/chat/completions"


def line(custom_id: str, *, url: str = CHAT, model: str = "m", **body: Any) -> dict[str, Any]:
    """One line of an input."""
    if url == CHAT:
        body.setdefault("messages", [{"role": "user", "content": custom_id}])
    body.setdefault("max_tokens", 4)
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": model, **body}}


def jsonl(*lines: object) -> bytes:
    """A file of lines."""
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


class Served:
    """A running server. `engine.feed` tells when batches change."""

    def __init__(self, engine: FakeEngine, runner: web.AppRunner, directory: Path) -> None:
        self.engine = engine
        self.directory = directory
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self.client = AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    async def upload(self, data: bytes, name: str = "in.jsonl") -> str:
        """The id of a file."""
        return (await self.client.files.create(file=(name, data), purpose="batch")).id

    async def begin(self, *lines: object, endpoint: Any = CHAT, window: Any = "24h", **more: Any) -> Batch:
        """A batch of these lines."""
        file = await self.upload(jsonl(*lines))
        return await self.client.batches.create(
            input_file_id=file, endpoint=endpoint, completion_window=window, **more
        )

    async def asked(self, requests: int) -> None:
        """Until the engine has been asked so many times."""
        async with asyncio.timeout(30):
            while len(self.engine.submitted) < requests:
                self.engine.arrived.clear()
                await self.engine.arrived.wait()

    async def completed(self, batch: Batch) -> int:
        """How many of its lines are answered by now."""
        counts = (await self.client.batches.retrieve(batch.id)).request_counts
        assert counts is not None
        return counts.completed

    async def ended(self, batch: Batch) -> Batch:
        """The batch once it is over, as events tell."""
        over = ("completed", "failed", "expired", "cancelled")
        async with asyncio.timeout(30):
            async for happening in self.engine.feed.follow(1000):
                if happening.text.startswith(batch.id) and happening.text.split()[2].rstrip(":") in over:
                    break
        return await self.client.batches.retrieve(batch.id)

    async def lines(self, file: str | None) -> list[dict[str, Any]]:
        """What a file of results says, by line."""
        if file is None:
            return []
        text = (await self.client.files.content(file)).text
        return [json.loads(each) for each in text.splitlines()]


Serve = Callable[..., Any]


@pytest.fixture
def serve(engine: FakeEngine, tmp_path: Path) -> Serve:
    """Starts servers, all on the same directory: `async with serve() as served`."""

    @asynccontextmanager
    async def start(keyring: Keyring | None = None, **settings: Any) -> AsyncIterator[Served]:
        store = Store(BatchSettings(**settings), tmp_path / "state")
        await store.open()
        runner = await start_http(engine, HttpSettings(port=0), keyring=keyring, store=store)
        await runner.app[BATCHES].start()
        served = Served(engine, runner, tmp_path / "state")
        try:
            yield served
        finally:
            await served.client.close()
            await runner.app[BATCHES].close()
            await runner.cleanup()
            await store.close()

    return start
