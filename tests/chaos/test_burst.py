"""Ten times what can be queued, at once, through the real daemon: refused early, and nothing grows."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import aiohttp
import psutil

from tests.chaos.traffic import Traffic, asks_of
from tests.e2e.daemon import Daemon
from tests.worker.helpers import save_tiny

WAITING = 20
BURST = 400
MIB = 1 << 20


def test_a_burst_is_refused_early_and_leaves_nothing(tmp_path: Path) -> None:
    """Who is admitted gets the right answer, whoever else came; the others a 503 with Retry-After."""
    save_tiny(tmp_path / "a")
    config = '[devices]\nkind = "cpu"\ncpu_workers = 1\nthreads = 1\nmemory = "768 KiB"\nblock = "8 KiB"\n'
    config += f'[[service]]\nname = "a"\nmodel = "{tmp_path / "a"}"\nmax_waiting = {WAITING}\n'
    daemon = Daemon(tmp_path, config)
    try:
        daemon.wait_healthy()
        outcomes, growth = asyncio.run(burst(daemon))
        assert set(outcomes) == {"right", 503}, outcomes
        assert outcomes["right"] >= WAITING
        assert growth < 64 * MIB
        assert all(device["kv_bytes"] == 0 for device in daemon.status()["devices"])
        assert daemon.stop() == 0
    finally:
        daemon.kill()


async def burst(daemon: Daemon) -> tuple[Counter[object], int]:
    """What became of all of them, and by how many bytes the daemon grew."""
    process = psutil.Process(daemon.process.pid)
    async with Traffic(daemon.url, asks_of(["a"], random.Random(1)), seed=1) as traffic:
        await traffic.learn()
        before = process.memory_info().rss
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def one(index: int) -> object:
                ask = index % len(traffic.asks)
                body = traffic.asks[ask].body(stream=False)
                async with session.post(f"{daemon.url}/v1/completions", json=body) as response:
                    answer = await response.json()
                    if response.status != 200:
                        assert float(response.headers["Retry-After"]) > 0
                        return response.status
                    return "right" if answer["choices"][0]["token_ids"] == traffic.right[ask] else "wrong"

            outcomes = Counter(await asyncio.gather(*map(one, range(BURST))))
        return outcomes, process.memory_info().rss - before
