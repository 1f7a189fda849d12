"""Limits of each API key: requests and tokens per minute, and requests at a time.

Owns the counts. Must not know HTTP headers, nor what a request is. A bucket holds one minute's worth and
fills evenly, so that a burst is served and the mean is kept. Tokens are charged as if the output were as long
as it may be; what was not used is given back when the request ends. Where that is more than the bucket holds,
as for every output whose length is left to a large context, it takes what there is; should it use more, the
key has to wait for that afterwards.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from seallmd.api.keys import Key
from seallmd.errors import RequestError

_MINUTE = 60.0


class Bucket:
    """One limit of one key."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        """What may be taken now."""
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / _MINUTE)
        self._at = now
        return self._level

    def wait_seconds(self, amount: float, now: float) -> float:
        """Until so much may be taken; inf when it never may."""
        if amount > self.per_minute:
            return float("inf")
        return max(0.0, (amount - self.level(now)) * _MINUTE / self.per_minute)

    def take(self, amount: float) -> None:
        """Take, or with a negative amount give back."""
        self._level = min(self.per_minute, self._level - amount)


class Rates:
    """The buckets of all keys."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}
        self._running: Counter[str] = Counter()  # requests that are not over, by key

    def charge(self, key: Key | None, prompt: int, output: int) -> int:
        """Take a request from the key's limits, or nothing from any of them; one that began so is to be ended
        by `give_back`. prompt, output: its tokens, the most that it may generate.

        Returns the tokens that were taken. Raises RequestError (429).
        """
        now = self._clock()
        if key is not None and key.max_requests and self._running[key.name] >= key.max_requests:
            limit = f"the limit of this key is {key.max_requests} requests at a time"
            raise RequestError(limit, status=429, code="rate_limit_exceeded", retry_after=1.0)
        tokens = self._fitted(key, prompt, output, now)
        wanted = (("requests", 1), ("tokens", tokens))
        buckets = [(what, self._bucket(key, what, now), amount) for what, amount in wanted]
        limited = [(what, bucket, amount) for what, bucket, amount in buckets if bucket is not None]
        for what, bucket, amount in limited:
            if seconds := bucket.wait_seconds(amount, now):
                raise _refusal(what, bucket, amount, seconds)
        for _, bucket, amount in limited:
            bucket.take(amount)
        if key is not None:
            self._running[key.name] += 1
        return tokens

    def _fitted(self, key: Key | None, prompt: int, output: int, now: float) -> int:
        """What a request is charged. Its prompt is certain, its output's end is not."""
        bucket = self._bucket(key, "tokens", now)
        if bucket is None or prompt + output <= bucket.per_minute:
            return prompt + output
        return max(prompt, int(bucket.level(now)))

    def give_back(self, key: Key | None, tokens: int) -> None:
        """A request is over; tokens: that were charged and not used, negative for what it used beyond."""
        if key is not None:
            self._running[key.name] -= 1
        bucket = self._bucket(key, "tokens", self._clock())
        if bucket is not None:
            bucket.take(-tokens)

    def left(self, key: Key) -> dict[str, tuple[int, int]]:
        """Limit and what is left of it, by "requests" and "tokens"; what has no limit is not there."""
        now = self._clock()
        buckets = {what: self._bucket(key, what, now) for what in ("requests", "tokens")}
        return {w: (b.per_minute, max(0, int(b.level(now)))) for w, b in buckets.items() if b is not None}

    def _bucket(self, key: Key | None, what: str, now: float) -> Bucket | None:
        """The key's bucket; a limit that was configured anew begins full."""
        per_minute = 0 if key is None else getattr(key, f"{what}_per_minute")
        if key is None or not per_minute:
            return None
        bucket = self._buckets.get((key.name, what))
        if bucket is None or bucket.per_minute != per_minute:
            bucket = self._buckets[key.name, what] = Bucket(per_minute, now)
        return bucket


def _refusal(what: str, bucket: Bucket, amount: float, seconds: float) -> RequestError:
    limit = f"the limit of this key is {bucket.per_minute} {what} per minute"
    if seconds == float("inf"):
        return RequestError(
            f"{limit}; this asks for {amount:g} at once", status=429, code="rate_limit_exceeded"
        )
    return RequestError(limit, status=429, code="rate_limit_exceeded", retry_after=seconds)
