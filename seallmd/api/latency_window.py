"""Latencies of the last minutes: percentiles by service, and which requests met their targets.

Owns a ring of slots, one a second, with latencies counted in buckets. Prometheus' histograms tell of
everything since the start; this tells of now, with finer buckets. Must not know who asks.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable

import msgspec

WINDOW_SECONDS = 300
QUANTILES = (0.5, 0.95, 0.99)
# Neighbouring buckets differ by this factor: a percentile is off by at most a twentieth.
GROWTH = 1.1
_SMALLEST_SECONDS = 1e-5
_LOG_GROWTH = math.log(GROWTH)

Percentiles = tuple[float, float, float]


class Targets(msgspec.Struct, frozen=True):
    """What counts as met, in seconds: to the first token, and on average for each further one.

    The defaults are the limits of MLPerf Inference for Llama 2 70B in its server scenario.
    """

    first_token_seconds: float = 2.0
    next_token_seconds: float = 0.2

    def met(self, first_seconds: float, each_seconds: float) -> bool:
        """Whether a request met them: so long to its first token, so long on average for each further one."""
        return first_seconds <= self.first_token_seconds and each_seconds <= self.next_token_seconds


class Figures(msgspec.Struct, frozen=True):
    """A window in figures. Percentiles (P50, P95, P99) are seconds, None where nothing was counted.

    ended: requests that ended by themselves; met: those of them within their targets; failed: the others that
    ended (whoever was cancelled counts nowhere).
    """

    first_token: Percentiles | None
    next_token: Percentiles | None
    ended: int
    met: int
    failed: int


class Counts:
    """Latencies in buckets, and ends of requests."""

    __slots__ = ("ends", "first_token", "next_token")

    def __init__(self) -> None:
        self.first_token: Counter[int] = Counter()
        self.next_token: Counter[int] = Counter()
        self.ends: Counter[str] = Counter()

    def add(self, other: Counts) -> None:
        """Count what `other` has counted."""
        for name in self.__slots__:
            getattr(self, name).update(getattr(other, name))

    def subtract(self, other: Counts) -> None:
        """Forget what `other` has counted."""
        for name in self.__slots__:
            mine, theirs = getattr(self, name), getattr(other, name)
            for key, count in theirs.items():
                mine[key] -= count
                if not mine[key]:
                    del mine[key]

    def figures(self) -> Figures:
        """What it comes to."""
        met, missed = self.ends["met"], self.ends["missed"]
        return Figures(
            percentiles(self.first_token),
            percentiles(self.next_token),
            met + missed,
            met,
            self.ends["failed"],
        )


class LatencyWindow:
    """The last WINDOW_SECONDS, by service."""

    def __init__(self, clock: Callable[[], float], targets: Targets | None = None) -> None:
        """clock: seconds."""
        self.targets = targets or Targets()
        self._clock = clock
        self._slots: deque[tuple[int, dict[str, Counts]]] = deque()
        self._whole: defaultdict[str, Counts] = defaultdict(Counts)

    def first_token(self, service: str, seconds: float) -> None:
        """A request's first token came after so long."""
        for counts in self._now(service):
            counts.first_token[_bucket(seconds)] += 1

    def next_token(self, service: str, seconds: float) -> None:
        """A further token came so long after the one before."""
        for counts in self._now(service):
            counts.next_token[_bucket(seconds)] += 1

    def ended(self, service: str, *, met: bool) -> None:
        """A request ended well, and met its targets or not."""
        for counts in self._now(service):
            counts.ends["met" if met else "missed"] += 1

    def failed(self, service: str) -> None:
        """A request ended in an error."""
        for counts in self._now(service):
            counts.ends["failed"] += 1

    def by_service(self) -> dict[str, Figures]:
        """The whole window; services without requests are not there."""
        self._expire()
        return {service: counts.figures() for service, counts in self._whole.items() if any(_parts(counts))}

    def recent(self, seconds: int) -> Figures:
        """The last so many seconds of all services together."""
        oldest = int(self._clock()) - seconds
        total = Counts()
        for second, services in reversed(self._slots):
            if second <= oldest:
                break
            for counts in services.values():
                total.add(counts)
        return total.figures()

    def _now(self, service: str) -> tuple[Counts, Counts]:
        """Where to count: this second's slot, and the sum of all."""
        second = int(self._clock())
        if not self._slots or self._slots[-1][0] != second:
            self._expire()
            self._slots.append((second, defaultdict(Counts)))
        return self._slots[-1][1][service], self._whole[service]

    def _expire(self) -> None:
        oldest = int(self._clock()) - WINDOW_SECONDS
        while self._slots and self._slots[0][0] <= oldest:
            for service, counts in self._slots.popleft()[1].items():
                self._whole[service].subtract(counts)


def percentiles(counts: Counter[int]) -> Percentiles | None:
    """P50, P95 and P99 in seconds by nearest rank; None of nothing."""
    total = counts.total()
    if not total:
        return None
    ordered = sorted(counts.items())
    p50, p95, p99 = (_quantile(ordered, math.ceil(share * total)) for share in QUANTILES)
    return p50, p95, p99


def _quantile(ordered: Iterable[tuple[int, int]], rank: int) -> float:
    bucket = 0
    for bucket, count in ordered:  # noqa: B007 - the last one is the answer
        rank -= count
        if rank <= 0:
            break
    return float(_SMALLEST_SECONDS * GROWTH ** (bucket + 0.5))


def _bucket(seconds: float) -> int:
    return max(0, int(math.log(max(seconds, _SMALLEST_SECONDS) / _SMALLEST_SECONDS) / _LOG_GROWTH))


def _parts(counts: Counts) -> Iterable[Counter[int] | Counter[str]]:
    return counts.first_token, counts.next_token, counts.ends
