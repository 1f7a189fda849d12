"""When the parts of a node have something to do although nothing happens, and until when they have not.

Owns the words for it, seconds on the node's clock: a *wakeup* is when a part wants a Tick, inf for never. A
node is *calm* while steps end as they should, nobody comes or goes, and no part waits for anything: then
settling its parts would change nothing, and is left out (most events are such). -inf: not now. Must not know
what is due.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Protocol


class Part(Protocol):
    """What looks at the node's state after events and goes on with its own business."""

    def settle(self) -> None:
        """Do what can be done now."""

    @property
    def calm_until(self) -> float:
        """Until when `settle` would do nothing, as long as the node is calm."""


def soonest(times: Iterable[float], now: float) -> float:
    """The first of some moments that is still to come; inf when none is."""
    found = inf
    for time in times:
        if now < time < found:
            found = time
    return found
