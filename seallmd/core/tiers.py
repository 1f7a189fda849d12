"""Tiers: how urgent a request is, in the words of OpenAI's `service_tier` and of its Batch API.

Owns the words, their order, and what a tier counts for. Must not know requests: those carry a tier's name.

A tier goes before the next one in the queue and in claims on memory, however long the other has waited;
within one, order of arrival is seniority. What runs at a *yielding* tier (flex, batch) gives up its memory
as soon as somebody more urgent waits for it; the others keep what they have. Batch work is *deferred*: it
runs where more urgent work leaves a gap, counts for nothing when busy models are swapped for others, and is
not counted where queues are limited, since its source keeps a bounded number of requests in the node.
"""

from __future__ import annotations

from typing import Literal

Tier = Literal["priority", "default", "flex", "batch"]

RANKS: dict[str, int] = {"priority": 0, "default": 1, "flex": 2, "batch": 3}
# What a request's progress is worth beside others', where services compete for the next step (`scheduler`).
WEIGHTS: dict[str, float] = {"priority": 4.0, "default": 1.0, "flex": 0.25, "batch": 0.25}
# Each yields its memory to those before it; within one, nobody yields.
DEFERRED = ("batch",)
YIELDING = (("priority", "default"), ("flex",), DEFERRED)
_SPAN = 1 << 40  # more requests than a node ever has

FIRST_ORDER = _SPAN  # seniority of the default tier begins here
END_OF_ORDERS = len(RANKS) * _SPAN  # goes behind every request


def seniority(tier: str, arrival: int) -> int:
    """The order of a request: lower goes first. arrival: its number, counted from FIRST_ORDER."""
    return arrival + (RANKS[tier] - RANKS["default"]) * _SPAN


def arrival_of(order: int) -> int:
    """The number that an order was made of, whatever its tier."""
    return FIRST_ORDER + order % _SPAN


def is_deferred(order: int) -> bool:
    """Whether an order is one of batch work."""
    return order >= RANKS["batch"] * _SPAN


def yields(tier: str, to: str) -> bool:
    """Whether what runs at a tier gives up its memory for what waits at another."""
    places = [place for each in (tier, to) for place, tiers in enumerate(YIELDING) if each in tiers]
    return places[0] > places[1]
