"""What the caller's key means for a request: its tier, its part of the prefix cache, its limits.

Owns the way from a key to generations and charges. Must not know HTTP, nor how limits are counted (`rates`).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from seallmd.api.fields import ServiceTier
from seallmd.api.keys import current_key
from seallmd.api.metrics import Metrics
from seallmd.api.rates import Rates
from seallmd.api.tiers import in_batch, tier_of
from seallmd.errors import RequestError
from seallmd.runtime.face import Generation


def keyed(generations: list[Generation], asked: ServiceTier | None = None) -> list[Generation]:
    """The same generations for the key at hand, at its tier or the one that was asked for.

    Prefixes are not shared between keys: how fast an answer comes would tell what others have asked. Raises
    RequestError (403).
    """
    key, tier = current_key.get(), tier_of(asked)
    prefix = "" if key is None else f"{key.name}/"
    return [msgspec.structs.replace(g, tier=tier, salt=prefix + g.salt) for g in generations]


class Charge:
    """What one HTTP request takes from the limits of its key.

    A line of a batch takes nothing: it waits for a gap anyway, and its key's other requests must not wait
    for it. It is counted all the same.
    """

    def __init__(self, rates: Rates, metrics: Metrics, batches: Sequence[Sequence[Generation]]) -> None:
        """Charge for all choices of all prompts. Raises RequestError (429) and then charges nothing."""
        self._key = current_key.get()
        self._limited = None if in_batch.get() else self._key
        self._rates = rates
        self._metrics = metrics
        generations = [generation for batch in batches for generation in batch]
        prompt, output = sum(len(g.prompt) for g in generations), sum(g.max_tokens for g in generations)
        try:
            self._tokens = rates.charge(self._limited, prompt, output)
        except RequestError:
            self._count("limited", 1)
            raise

    def settle(self, used: int) -> None:
        """Give back what was not used. used: tokens."""
        self._rates.give_back(self._limited, self._tokens - used)
        self._count("requests", 1)
        self._count("tokens", used)

    def _count(self, what: str, amount: int) -> None:
        if self._key is not None:
            self._metrics.keys[what].labels(self._key.name).inc(amount)
