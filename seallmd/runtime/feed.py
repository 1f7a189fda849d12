"""What happens, for those who look on: a bounded memory of it, and followers.

Owns that memory alone. Must not know sockets, nor what events mean. Nobody who looks on holds the daemon up:
a follower that is too slow misses some, and is told how many.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable

import msgspec

KEPT = 1000  # happenings that are remembered


class Happening(msgspec.Struct, frozen=True):
    """One thing that happened.

    number: counted from 1 since the daemon started. time: seconds since 1970. kind: "service" (swaps,
    preemptions, failures and their reasons; also of devices), "request" (its end), "batch" (its status),
    "operator" (commands) or "configuration". service: whom it concerns, empty = nobody alone. text: a
    sentence.
    """

    number: int
    time: float
    kind: str
    service: str
    text: str


class EventFeed:
    """Remembers the last happenings and lets others follow."""

    def __init__(self, kept: int = KEPT, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._last: deque[Happening] = deque(maxlen=kept)
        self._count = 0
        self._more = asyncio.Event()

    def tell(self, kind: str, service: str, text: str) -> None:
        """Something happened now."""
        self._count += 1
        self._last.append(Happening(self._count, self._clock(), kind, service, text))
        self._more.set()
        self._more = asyncio.Event()

    def recent(self, count: int) -> list[Happening]:
        """The last so many, the oldest first."""
        return list(self._last)[-count:] if count else []

    async def follow(self, count: int) -> AsyncGenerator[Happening, None]:
        """The last so many, and from there on all that happen, for ever."""
        number = self._count - len(self.recent(count))
        while True:
            more = self._more
            for happening in [h for h in self._last if h.number > number]:
                if happening.number > number + 1:
                    yield self._missed(happening, happening.number - number - 1)
                number = happening.number
                yield happening
            if number == self._count:
                await more.wait()

    def _missed(self, next_: Happening, count: int) -> Happening:
        text = f"{count} events were missed"
        return Happening(next_.number - 1, next_.time, "operator", "", text)
