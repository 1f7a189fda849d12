"""The ledger of one device's host memory for preempted KV.

Owns which slots are free; a slot holds one block. Must not know requests, nor why a block is saved.
"""

from __future__ import annotations

from collections.abc import Iterable


class HostSlots:
    """Slots 0 .. capacity-1 of one device."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def available(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` slots. The caller has looked at `available`."""
        assert count <= self.available, f"{count} slots wanted, {self.available} available"
        return [self._free.pop() for _ in range(count)]

    def release(self, slots: Iterable[int]) -> None:
        """These belong to nobody again."""
        self._free.extend(slots)

    def check(self, held: Iterable[int]) -> None:
        """Every slot is free or in `held`, and once."""
        slots = sorted([*self._free, *held])
        assert slots == list(range(self.capacity)), "a host slot is lost, or somebody's twice"
