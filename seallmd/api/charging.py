"""What the caller's key means for a request: its tier, its part of the prefix cache, its limits.

Owns the way from a key to generations and charges. Must not know HTTP, nor how limits are counted (`rates`).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from seallmd.api.keys import current_key
from seallmd.api.metrics import Metrics
from seallmd.api.rates import Rates
from seallmd.errors import RequestError
from seallmd.runtime.face import Generation


def keyed(generations: list[Generation]) -> list[Generation]:
    """The same generations for the key at hand. Prefixes are not shared between keys: how fast an answer
    comes would tell what others have asked."""
    key = current_key.get()
    if key is None:
        return generations
    return [msgspec.structs.replace(g, tier=key.tier, salt=f"{key.name}/{g.salt}") for g in generations]


class Charge:
    """What one HTTP request takes from the limits of its key."""

    def __init__(self, rates: Rates, metrics: Metrics, batches: Sequence[Sequence[Generation]]) -> None:
        """Charge for all choices of all prompts. Raises RequestError (429) and then charges nothing."""
        self._key = current_key.get()
        self._rates = rates
        self._metrics = metrics
        self._tokens = sum(len(g.prompt) + g.max_tokens for batch in batches for g in batch)
        try:
            rates.charge(self._key, 1, self._tokens)
        except RequestError:
            self._count("limited", 1)
            raise

    def settle(self, used: int) -> None:
        """Give back what was not used. used: tokens."""
        self._rates.give_back(self._key, self._tokens - used)
        self._count("requests", 1)
        self._count("tokens", used)

    def _count(self, what: str, amount: int) -> None:
        if self._key is not None:
            self._metrics.keys[what].labels(self._key.name).inc(amount)
