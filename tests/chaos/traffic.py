"""Traffic for a daemon under attack: clients that know what every answer must be.

Owns the requests, what each must yield (learnt in quiet), and the count of outcomes. An answer is right token
for token, or it is one of the errors that a client is promised; anything else is kept in `wrong`.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterable

import aiohttp

PROMPTS = 5
# What a client may be told while things break: (status, code).
PROMISED = {
    (503, "model_unavailable"),
    (503, "model_evicted"),
    (503, "model_loading"),
    (503, "out_of_memory"),
    (503, "overloaded"),
    (500, "worker_lost"),
    (500, "step_failed"),
}


class Ask:
    """One question: a service, a prompt in token ids, a length."""

    def __init__(self, service: str, prompt: list[int], max_tokens: int) -> None:
        self.service, self.prompt, self.max_tokens = service, prompt, max_tokens

    def body(self, *, stream: bool) -> dict[str, object]:
        """As it is sent; greedy, so that there is one right answer."""
        return {
            "model": self.service,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": stream,
        }


def asks_of(services: Iterable[str], draw: random.Random) -> list[Ask]:
    """A few questions for each service; half of them share a beginning."""
    shared = [draw.randrange(3, 97) for _ in range(24)]
    found = []
    for service in services:
        for index in range(PROMPTS):
            own = [draw.randrange(3, 97) for _ in range(draw.randint(2, 60))]
            prompt = shared + own if index % 2 else own
            found.append(Ask(service, prompt, draw.choice((4, 24, 80))))
    return found


class Refused(Exception):
    """The daemon answered with an error."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.key = (status, code)


class Traffic:
    """Clients in a loop. open: they may begin; down: the daemon is known to be away."""

    def __init__(self, url: str, asks: list[Ask], seed: int) -> None:
        self.url = url
        self.asks = asks
        self.right: dict[int, list[int]] = {}
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.in_flight = 0
        self.down = False
        self.open = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._seed = seed
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Traffic:
        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.session.close()

    async def learn(self) -> None:
        """What every question yields when nothing happens."""
        for index, ask in enumerate(self.asks):
            self.right[index] = await self.ask(ask, stream=False)
            assert len(self.right[index]) == ask.max_tokens

    def start(self, clients: int) -> None:
        """Send so many requests at a time, from now on, while `open`."""
        self._tasks = [asyncio.create_task(self._run(random.Random(self._seed + i))) for i in range(clients)]
        self.open.set()

    async def quiet(self, seconds: float = 60.0) -> None:
        """Begin nothing more, and wait until all that was begun has ended."""
        self.open.clear()
        async with asyncio.timeout(seconds):
            await self._idle.wait()

    async def _run(self, draw: random.Random) -> None:
        while True:
            await self.open.wait()
            index = draw.randrange(len(self.asks))
            self._count_in_flight(1)
            try:
                tokens = await self.ask(self.asks[index], stream=draw.random() < 0.6)
                if tokens == self.right[index]:
                    self.outcomes["right"] += 1
                else:
                    self.wrong.append(f"{self.asks[index].service}: {tokens} is not {self.right[index]}")
            except Refused as error:
                self._count(error)
                await asyncio.sleep(0.1)
            except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
                if not self.down:
                    self.wrong.append(f"{type(error).__name__} {error}")
                self.outcomes["no connection"] += 1
                await asyncio.sleep(0.2)
            finally:
                self._count_in_flight(-1)

    def _count_in_flight(self, change: int) -> None:
        self.in_flight += change
        if self.in_flight:
            self._idle.clear()
        else:
            self._idle.set()

    def _count(self, error: Refused) -> None:
        status, code = error.key
        self.outcomes[f"{status} {code}"] += 1
        if error.key not in PROMISED and not self.down:
            self.wrong.append(str(error))

    async def ask(self, ask: Ask, *, stream: bool) -> list[int]:
        """One request. Raises Refused, also for an error in mid-stream."""
        url = f"{self.url}/v1/completions"
        async with self.session.post(url, json=ask.body(stream=stream)) as response:
            if response.status != 200:
                raise _refused(response.status, await response.json())
            if not stream:
                return list((await response.json())["choices"][0]["token_ids"])
            tokens: list[int] = []
            async for line in response.content:
                if line.startswith(b"data: {"):
                    document = json.loads(line[6:])
                    if "error" in document:
                        raise _refused(0, document)
                    for choice in document["choices"]:
                        tokens += choice["token_ids"]
            return tokens


def _refused(status: int, document: dict[str, dict[str, str]]) -> Refused:
    """status 0: of an error in mid-stream, which has a code alone."""
    error = document["error"]
    known = {code: number for number, code in PROMISED}
    return Refused(status or known.get(error["code"], 0), error["code"], error["message"])
