"""Mixed traffic for as long as you like, and what it leaves behind: `python -m tools.soak --minutes 30`.

Starts a daemon of its own and sends what real clients send: chats and completions, streamed and not, several
choices, long and short prompts, clients that leave, to all services, so that models are swapped. Samples the
memory, descriptors and asyncio tasks of the daemon and the memory of its children. Exits 0 when memory was
flat, nothing else grew, and no request ended in a way that is not explained; else 1 with what did.

Owns the traffic and the judgement. The daemon is `tools.demo`'s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from rich.console import Console

from seallmd.errors import SeallmdError
from tools.demo import ROOT, Daemon, DemoError, running, wait_until_ready

MIB = 1 << 20
SAMPLE_SECONDS = 5.0
WARM_UP = 0.3  # of the run: caches fill, allocators settle
GROWTH = (0.03, 24 * MIB)  # of memory after that: within either of these it is flat
SPARE = 8  # descriptors and tasks that may be there more at the end than at the beginning, both at rest
_WORDS = ("river", "bridge", "mountain", "engine", "letter", "music", "winter", "garden", "question")
_TASKS = re.compile(r"status of the event loop.*?tasks=(\d+)")


@dataclass
class Sample:
    """One look. Bytes of the daemon and of all its children."""

    at: float
    daemon: int
    children: int


@dataclass
class Soak:
    """One run's figures. rest: (descriptors, tasks) before and after, with nothing to do."""

    samples: list[Sample] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    unexplained: list[str] = field(default_factory=list)
    tokens: int = 0
    rest: list[tuple[int, int]] = field(default_factory=list)

    def troubles(self) -> list[str]:
        """What is wrong; empty when all is well."""
        found = [f"unexplained: {text}" for text in self.unexplained[:5]]
        for what in ("daemon", "children"):
            before, after = growth([getattr(sample, what) for sample in self.samples])
            if after - before > max(GROWTH[0] * before, GROWTH[1]):
                found.append(f"{what}: {before / MIB:.0f} MiB became {after / MIB:.0f} MiB")
        for what, before, after in zip(("descriptors", "tasks"), *self.rest, strict=True):
            if after > before + SPARE:
                found.append(f"{what}: {before} became {after}")
        if not self.outcomes["well"]:
            found.append("no request ended well")
        return found

    def figures(self) -> dict[str, Any]:
        """For people and programs."""
        return {
            "outcomes": dict(self.outcomes.most_common()),
            "unexplained": len(self.unexplained),
            "output_tokens": self.tokens,
            "daemon_mib": [round(v / MIB, 1) for v in growth([s.daemon for s in self.samples])],
            "children_mib": [round(v / MIB, 1) for v in growth([s.children for s in self.samples])],
            "descriptors": [rest[0] for rest in self.rest],
            "tasks": [rest[1] for rest in self.rest],
        }


def growth(values: list[int]) -> tuple[float, float]:
    """Medians of the first and of the last third of what came after the warm-up."""
    settled = values[int(len(values) * WARM_UP) :]
    third = max(1, len(settled) // 3)
    return _median(settled[:third]), _median(settled[-third:])


def _median(values: list[int]) -> float:
    ordered = sorted(values)
    return float(ordered[len(ordered) // 2])


# ------------------------------------------------------------------------------------------- traffic


class Client:
    """Sends requests one after the other, of every kind."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, models: list[str], seed: int) -> None:
        self._session = session
        self._url = base_url
        self._models = models
        self._random = random.Random(seed)

    async def run(self, soak: Soak, until: float) -> None:
        """Until a time of the event loop's clock."""
        while asyncio.get_running_loop().time() < until:
            try:
                soak.outcomes[await self._one(soak)] += 1
            except (aiohttp.ClientError, TimeoutError) as error:
                soak.unexplained.append(f"{type(error).__name__}: {error}")
            # Bursts: now and then a client is quiet, so that models go idle and leave.
            await asyncio.sleep(self._random.choice((0.0, 0.0, 0.0, 0.5, 2.0)))

    def _body(self) -> tuple[str, dict[str, Any]]:
        draw = self._random
        body: dict[str, Any] = {
            "model": draw.choice(self._models),
            "max_tokens": draw.choice((1, 8, 40)),
            "stream": draw.random() < 0.6,
            "temperature": draw.choice((0.0, 0.8)),
            "seed": draw.randrange(1000),
        }
        text = " ".join(draw.choices(_WORDS, k=draw.choice((2, 10, 60))))
        if draw.random() < 0.15:
            body["n"] = 3
        if draw.random() < 0.4:
            return "chat/completions", {**body, "messages": [{"role": "user", "content": text}]}
        return "completions", {**body, "prompt": text}

    async def _one(self, soak: Soak) -> str:
        path, body = self._body()
        leaves = self._random.random() < 0.1
        async with self._session.post(f"{self._url}/{path}", json=body) as response:
            if response.status == 503 and "Retry-After" in response.headers:
                return "503 with Retry-After"
            if response.status == 400 and "chat template" in await response.text():
                return "no chat template"
            if response.status != 200:
                soak.unexplained.append(f"{response.status} {(await response.text())[:200]}")
                return "error"
            if not body["stream"]:
                soak.tokens += (await response.json())["usage"]["completion_tokens"]
                return "well"
            async for line in response.content:
                if line.startswith(b'data: {"error"'):
                    soak.unexplained.append(line.decode()[:200])
                    return "error"
                soak.tokens += line.startswith(b"data: {")
                if leaves and self._random.random() < 0.3:
                    response.close()
                    return "left"
            return "well"


# ------------------------------------------------------------------------------------------- the run


async def sample(soak: Soak, process: psutil.Process, until: float) -> None:
    """Look at the processes now and then."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while loop.time() < until:
        children = 0
        for child in process.children(recursive=True):
            try:
                # Shared memory (host images, arenas of CPU devices) is theirs by configuration, not by leaks.
                memory = child.memory_info()
                children += memory.rss - memory.shared
            except psutil.NoSuchProcess:
                continue
        memory = process.memory_info()
        soak.samples.append(Sample(loop.time() - began, memory.rss - memory.shared, children))
        await asyncio.sleep(SAMPLE_SECONDS if until - began > 60 else 0.5)


async def at_rest(daemon: Daemon, process: psutil.Process) -> tuple[int, int]:
    """Descriptors and tasks once nothing is left to do."""
    for _ in range(100):
        services = (daemon.status() or {"services": []})["services"]
        if not any(service["running"] or service["waiting"] for service in services):
            break
        await asyncio.sleep(0.2)
    await asyncio.sleep(1.0)  # connections of clients that left are being closed
    seen = len(_TASKS.findall(daemon.log.read_text()))
    process.send_signal(signal.SIGUSR1)
    for _ in range(100):
        if len(found := _TASKS.findall(daemon.log.read_text())) > seen:
            return process.num_fds(), int(found[-1])
        await asyncio.sleep(0.1)
    raise DemoError("the daemon does not answer SIGUSR1")


async def soak_daemon(daemon: Daemon, seconds: float, clients: int, seed: int) -> Soak:
    """So long, with so many clients at a time."""
    status = daemon.status()
    assert status is not None
    models = [service["name"] for service in status["services"] if service["state"] != "refused"]
    process = psutil.Process(status["daemon"]["pid"])
    soak = Soak()
    until = asyncio.get_running_loop().time() + seconds
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
        senders = [Client(session, daemon.base_url, models, seed + index) for index in range(clients)]
        first = asyncio.get_running_loop().time() + min(5.0, seconds / 4)
        await asyncio.gather(*(sender.run(soak, first) for sender in senders))  # everything was there once
        soak.rest.append(await at_rest(daemon, process))
        await asyncio.gather(sample(soak, process, until), *(sender.run(soak, until) for sender in senders))
        soak.rest.append(await at_rest(daemon, process))
    return soak


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Mixed traffic for long, and what it leaves behind.")
    parser.add_argument("--config", type=Path, default=ROOT / "seallmd.toml")
    parser.add_argument("--minutes", type=float, default=30.0, help="default: %(default)s; in CI: 2")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        with running(options.config, console) as daemon:
            wait_until_ready(daemon, console)
            began = time.monotonic()
            soak = asyncio.run(soak_daemon(daemon, 60 * options.minutes, options.clients, options.seed))
            seconds = time.monotonic() - began
            daemon.stop()
    except SeallmdError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    text = json.dumps({"seconds": round(seconds), **soak.figures()}, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    for trouble in (troubles := soak.troubles()):
        print(f"soak: {trouble}", file=sys.stderr)
    return 1 if troubles else 0


if __name__ == "__main__":
    sys.exit(main())
