"""At which tier a request is served: what it asks for, what its key may have, and batch work below all.

Owns that judgement. Must not know what tiers decide: that is `core.tiers`.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import get_args

from seallmd.api.fields import ServiceTier
from seallmd.api.keys import current_key
from seallmd.core.events import Tier
from seallmd.errors import RequestError

_TIERS = get_args(Tier)  # the most urgent first

# Whether a line of a batch is being handled, and not a request that somebody waits for.
in_batch: ContextVar[bool] = ContextVar("in_batch", default=False)


def tier_of(asked: ServiceTier | None) -> Tier:
    """The tier that serves. Without a wish it is the key's own, which is also the best that the key may have.

    Raises RequestError (403).
    """
    if in_batch.get():
        return "batch"
    key = current_key.get()
    own: Tier = "default" if key is None else key.tier
    if asked is None or asked == "auto":
        return own
    if key is not None and _TIERS.index(asked) < _TIERS.index(own):
        raise RequestError(
            f"this key's tier is {own!r}: it may not have service_tier {asked!r}",
            status=403,
            code="tier_not_allowed",
            param="service_tier",
        )
    return asked
