"""How long requests took lately, by service, for those who look on.

Owns a window of recent requests. Metrics have histograms of everything since the start; this is what is going
on now. Must not know what reads it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

import msgspec

WINDOW_REQUESTS = 200
WINDOW_SECONDS = 300.0


class Latencies(msgspec.Struct, frozen=True):
    """Of a service's last requests. Seconds: to the first token, and for each further one.

    requests: how many these figures are of.
    """

    requests: int
    first_p50: float
    first_p99: float
    next_p50: float
    next_p99: float


class RecentLatencies:
    """Remembers so many requests of each service, for so long."""

    def __init__(self) -> None:
        self._ended: dict[str, deque[tuple[float, float, float]]] = defaultdict(
            lambda: deque(maxlen=WINDOW_REQUESTS)
        )

    def add(self, service: str, now: float, first_seconds: float, seconds: float, tokens: int) -> None:
        """A request ended well: so long to the first token, so long in all, so many tokens."""
        each = (seconds - first_seconds) / (tokens - 1) if tokens > 1 else 0.0
        self._ended[service].append((now, first_seconds, each))

    def report(self, now: float) -> dict[str, Latencies]:
        """By service; those that nobody used lately are not there."""
        found = {}
        for service, ended in self._ended.items():
            recent = [(first, each) for at, first, each in ended if now - at <= WINDOW_SECONDS]
            if recent:
                firsts, nexts = (sorted(values) for values in zip(*recent, strict=True))
                found[service] = Latencies(
                    *(len(recent), _at(firsts, 0.5), _at(firsts, 0.99)),
                    *(_at(nexts, 0.5), _at(nexts, 0.99)),
                )
        return found


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
