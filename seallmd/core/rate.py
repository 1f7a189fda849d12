"""How many per second, lately.

Owns an exponentially weighted rate. Must not read a clock: `now` is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Rate:
    """Events per second, weighted by exp(-age / window_seconds)."""

    window_seconds: float = 5.0
    _level: float = 0.0
    _at: float = 0.0

    def add(self, count: float, now: float) -> None:
        """`count` things happened at `now`."""
        self._level = self.value(now) + count / self.window_seconds
        self._at = now

    def begin(self, rate: float, now: float) -> None:
        """Take it that there was this rate up to `now`."""
        self._level, self._at = rate, now

    def value(self, now: float) -> float:
        """The rate at `now`; falls towards 0 while nothing happens."""
        age = now - self._at
        return self._level * math.exp(-age / self.window_seconds) if age > 0 else self._level
