"""The runtime's public face: all that `api` may ask of the running system.

Owns the interface and the stream of one request. `runtime.engine.Engine` implements it; tests of `api` use
a stand-in. Must not know HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import msgspec

from seallmd.core.events import Finish, OperatorEvent, Tier
from seallmd.core.messages import Pooled, Sampling, Scores
from seallmd.core.settings import ServiceSettings
from seallmd.core.shapes import ModelShape
from seallmd.core.status import ArenaMap, NodeStatus, PlanStatus, RequestStatus, ServiceDetail
from seallmd.runtime.feed import EventFeed


class ServiceView(msgspec.Struct, frozen=True):
    """What `api` needs of a configured service.

    directory: where its tokenizer lies; shape: of the model; both None until it was probed.
    reason: why it was refused, else empty.
    """

    settings: ServiceSettings
    created: int
    directory: str | None
    shape: ModelShape | None
    reason: str


class Generation(msgspec.Struct, frozen=True):
    """A request as the engine takes it. Fields as in `core.events.Arrived`."""

    service: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_ids: tuple[int, ...] = ()
    salt: str = ""
    tier: Tier = "default"


class StreamWatcher(Protocol):
    """Sees what passes through a stream when it comes, however slowly it is read."""

    def pushed(self, tokens: int) -> None:
        """So many tokens came."""

    def ended(self, finish: Finish) -> None:
        """Nothing follows."""


class TokenStream:
    """Tokens of one request, from the engine (`push`, `end`) to one reader.

    Bounded by the request's own max_tokens: a reader that is slow gets several tokens at once. scores: what
    came of the log-probabilities that it wants, each before its token; the reader takes them from there.
    pooled: the same for parts of the vector, which are complete at the end.
    """

    def __init__(self, request: int) -> None:
        self.request = request
        self.cached = 0
        self.finish: Finish | None = None
        self.scores: list[Scores] = []
        self.pooled: list[Pooled] = []
        self._tokens: list[int] = []
        self._ready = asyncio.Event()
        self._watcher: StreamWatcher | None = None

    def watch(self, watcher: StreamWatcher) -> None:
        """Tell `watcher` of everything, what has come already included."""
        self._watcher = watcher
        if self._tokens:
            watcher.pushed(len(self._tokens))
        if self.finish is not None:
            watcher.ended(self.finish)

    def push(self, tokens: tuple[int, ...]) -> None:
        """Add tokens. Called by the engine."""
        self._tokens += tokens
        self._ready.set()
        if self._watcher is not None:
            self._watcher.pushed(len(tokens))

    def score(self, scores: Scores) -> None:
        """Add log-probabilities. Called by the engine, before it pushes their tokens."""
        self.scores.append(scores)

    def pool(self, pooled: Pooled) -> None:
        """Add a part of the vector. Called by the engine."""
        self.pooled.append(pooled)

    def end(self, finish: Finish) -> None:
        """Nothing follows. Called by the engine, once."""
        self.finish = finish
        self._ready.set()
        if self._watcher is not None:
            self._watcher.ended(finish)

    async def batches(self) -> AsyncIterator[list[int]]:
        """Yield what has come since the last time, until `finish` is set. Lists are never empty."""
        while True:
            await self._ready.wait()
            self._ready.clear()
            tokens, self._tokens = self._tokens, []
            if tokens:
                yield tokens
            if self.finish is not None and not self._tokens:
                return


class EngineFace(Protocol):
    """What `api` sees of the engine. All calls are made on the event loop; plain ones return at once."""

    def services(self) -> list[ServiceView]:
        """Every configured service, in the order of the configuration."""

    def service(self, name: str) -> ServiceView | None:
        """One service by name."""

    def submit(self, generations: list[Generation]) -> list[TokenStream]:
        """Start requests that share one prompt (n choices of it; the first one's prefill serves all).

        Raises RequestError (503 when draining or when too many wait) and then starts none of them.
        """

    def cancel(self, request: int) -> None:
        """The client is gone or has enough. Unknown and finished requests are ignored."""

    def status(self) -> NodeStatus:
        """The report of this moment."""

    def detail(self, service: str) -> ServiceDetail | None:
        """All that is known of one service; None when there is no such service."""

    @property
    def feed(self) -> EventFeed:
        """What happens."""

    def hurry(self, service: str) -> None:
        """Somebody asks for a service that has not been examined: it goes before others."""

    def keep(self, service: str, seconds: float) -> None:
        """Have a service stay for so long after its last request; 0 = for good."""

    def requests(self) -> list[RequestStatus]:
        """Every request that is not over, the most senior first."""

    def arena_maps(self, cells: int) -> list[ArenaMap]:
        """Who holds which part of each device's arena, in at most so many cells."""

    def plan(self) -> PlanStatus | None:
        """The plan in force and the best one known; None while nothing is planned."""

    async def load(self, service: str, devices: tuple[int, ...] = ()) -> None:
        """Bring a service in, to named devices if any; returns when it is resident.

        Raises ControlError with the reason.
        """

    async def evict(self, service: str, now: bool) -> None:
        """Take a service out; returns when its memory is free. Raises ControlError with the reason."""

    async def operate(self, make: Callable[[int], OperatorEvent]) -> None:
        """Carry out what an operator asks for; `make` gets the ticket. Returns when it is done.

        Raises ControlError with the reason.
        """
