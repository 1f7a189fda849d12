"""seallmctl batches: everybody's, with their progress, and an end to one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from seallmd.api.batch.operator import BatchOperator
from seallmd.api.batch.store import Store
from seallmd.api.control import ControlServer
from seallmd.api.server import BATCHES, start_http
from seallmd.api.settings import BatchSettings, HttpSettings
from tests.api.engine_double import FakeEngine
from tests.ctl.test_seallmctl import run


@pytest.fixture
async def client(engine: FakeEngine, server: ControlServer, tmp_path: Path) -> AsyncIterator[AsyncOpenAI]:
    """HTTP with batches, which the control socket shows."""
    store = Store(BatchSettings(), tmp_path / "state")
    await store.open()
    http = await start_http(engine, HttpSettings(port=0), store=store)
    await http.app[BATCHES].start()
    server.batches = BatchOperator(store, http.app[BATCHES])
    url = f"http://127.0.0.1:{http.addresses[0][1]}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client
    await http.app[BATCHES].close()
    await http.cleanup()
    await store.close()


async def test_batches_and_an_end_to_one(client: AsyncOpenAI, engine: FakeEngine, control: Path) -> None:
    """Protects what operators see of batches, in words and for programs, and --cancel."""
    engine.pause()
    body = {"model": "m", "prompt": "x"}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    file = await client.files.create(file=("in", json.dumps(line).encode()), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="2h"
    )
    await engine.arrived.wait()
    (shown,) = json.loads((await run("--socket", control, "batches", "--json"))[1])
    assert (shown["id"], shown["lines"], shown["completed"]) == (batch.id, 1, 0)
    assert 7000 < shown["left_seconds"] <= 7200
    code, out, _ = await run("--socket", control, "batches")
    assert code == 0
    assert {batch.id, "/v1/completions", "in_progress"} <= set(out.split())
    code, out, _ = await run("--socket", control, "batches", "--cancel", batch.id)
    assert (code, out.strip()) == (0, f"{batch.id} is being cancelled")
    async for happening in engine.feed.follow(1000):
        if happening.text.startswith(f"{batch.id} is cancelled"):
            break
    assert not engine.live
    code, _, err = await run("--socket", control, "batches", "--cancel", batch.id)
    assert (code, "cannot be cancelled" in err) == (2, True)
    assert (await run("--socket", control, "batches", "--cancel", "batch_0"))[0] == 2


async def test_without_batches(server: ControlServer, control: Path) -> None:
    """Protects the answer where there are none: one line and exit code 2."""
    assert server.batches is None
    code, _, err = await run("--socket", control, "batches")
    assert (code, "no batches" in err) == (2, True)
