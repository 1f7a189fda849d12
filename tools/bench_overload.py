"""Ten times the load that a service bears, with and without a limit on waiting.

    python -m tools.bench_overload [MODEL] [--limits 0 3] [--seconds 15]

Measures what the service bears with clients that wait for their answers, then sends ten times as many
requests per second for a while (Poisson), to a daemon of its own for each limit. Prints how long those that
were served waited for their first token, how many were refused and how soon, how many were served per second,
and by how much the daemon's memory grew. Exits 1 when a request ended otherwise than served, or refused with
Retry-After.

Owns the load and the figures. The daemon is `tools.demo`'s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
from rich.console import Console

from tools.demo import ROOT, Daemon, running, wait_until_ready

MIB = 1 << 20
CLIENTS = 16  # of the measurement of what is borne
TOKENS = (100, 20_000)  # ids that prompts are drawn from
PROMPT_TOKENS, OUTPUT_TOKENS = (8, 64), (4, 32)  # how many


@dataclass
class Load:
    """What became of requests. Seconds each: first, until the first token; refused, until the refusal."""

    first: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    ended: float = 0.0

    def line(self, began: float) -> str:
        """For people."""
        waited = f"first token P50 {_at(self.first, 0.5):.2f} s, P99 {_at(self.first, 0.99):.2f} s"
        refused = f"{len(self.refused)} refused"
        if self.refused:
            refused += f" (P99 after {_at(self.refused, 0.99):.2f} s)"
        rate = len(self.first) / (self.ended - began)
        return f"{len(self.first)} served, {rate:.1f} a second, {waited}; {refused}; {len(self.wrong)} wrong"


def _at(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


class Sender:
    """Sends requests of seeded lengths."""

    def __init__(self, session: aiohttp.ClientSession, url: str, seed: int) -> None:
        self._session, self._url, self._draw = session, url, random.Random(seed)

    async def one(self, load: Load) -> None:
        """One streamed completion."""
        draw = self._draw
        body = {
            "model": "m",
            "prompt": [draw.randrange(*TOKENS) for _ in range(draw.randint(*PROMPT_TOKENS))],
            "max_tokens": draw.randint(*OUTPUT_TOKENS),
            "ignore_eos": True,
            "stream": True,
        }
        began = time.monotonic()
        try:
            async with self._session.post(f"{self._url}/completions", json=body) as response:
                if response.status == 503 and float(response.headers.get("Retry-After", 0)) > 0:
                    load.refused.append(time.monotonic() - began)
                    return
                if response.status != 200:
                    load.wrong.append(f"{response.status} {(await response.text())[:200]}")
                    return
                await self._read(response, load, began)
        except (aiohttp.ClientError, TimeoutError) as error:
            load.wrong.append(f"{type(error).__name__}: {error}")

    async def _read(self, response: aiohttp.ClientResponse, load: Load, began: float) -> None:
        first, last = 0.0, b""
        async for line in response.content:
            if line.startswith(b"data: "):
                first, last = first or time.monotonic() - began, line
        if last.strip() != b"data: [DONE]":
            load.wrong.append(f"a stream ended with {last[:200]!r}")
            return
        load.first.append(first)
        load.ended = time.monotonic()

    async def borne(self, seconds: float) -> float:
        """Requests per second with clients that wait for their answers."""
        load, until, began = Load(), time.monotonic() + seconds, time.monotonic()

        async def client() -> None:
            while time.monotonic() < until:
                await self.one(load)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        return len(load.first) / (load.ended - began)

    async def burst(self, rate: float, seconds: float) -> Load:
        """So many requests per second, whatever comes of them."""
        load, tasks, at = Load(), list[asyncio.Task[None]](), time.monotonic()
        until = at + seconds
        while at < until:
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            tasks.append(asyncio.create_task(self.one(load)))
            at += self._draw.expovariate(rate)
        await asyncio.gather(*tasks)
        return load


def configuration(model: Path, longest: float, threads: int) -> str:
    """One service on one CPU device."""
    return (
        f'[http]\nport = 0\n[devices]\nkind = "cpu"\ncpu_workers = 1\nthreads = {threads}\n'
        f'[[service]]\nname = "m"\nmodel = {json.dumps(str(model))}\npreload = true\n'
        f"max_waiting = 100000\nmax_wait_seconds = {longest}\n"
    )


async def measure(
    daemon: Daemon, options: argparse.Namespace, rate: float
) -> tuple[float, Load, float, float]:
    """(requests per second that are borne, what became of the burst, its beginning, MiB of growth)"""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=1200)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        sender = Sender(session, daemon.base_url, options.seed)
        rate = rate or await sender.borne(options.seconds)
        process = psutil.Process(daemon.pid)
        before, began = process.memory_info().rss, time.monotonic()
        load = await sender.burst(options.times * rate, options.seconds)
        return rate, load, began, (process.memory_info().rss - before) / MIB


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="What a limit on waiting does under overload.")
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "models/smollm2-135m-instruct")
    parser.add_argument(
        "--limits", type=float, nargs="+", default=[0.0, 3.0], help="max_wait_seconds; 0: none"
    )
    parser.add_argument("--times", type=float, default=10.0, help="what is borne")
    parser.add_argument("--seconds", type=float, default=15.0, help="of the measurement, and of the burst")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    console, rate, wrong = Console(stderr=True), 0.0, list[str]()
    for longest in options.limits:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "seallmd.toml"
            file.write_text(configuration(options.model.absolute(), longest, options.threads))
            with running(file, console) as daemon:
                wait_until_ready(daemon, console)
                rate, load, began, grown = asyncio.run(measure(daemon, options, rate))
                daemon.stop()
        wrong += load.wrong
        print(f"{options.times:g} x {rate:.1f} a second, max_wait_seconds = {longest:g}: {load.line(began)}; "
              f"the daemon grew by {grown:.0f} MiB", flush=True)  # fmt: skip
    for text in wrong[:5]:
        print(f"bench_overload: {text}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
