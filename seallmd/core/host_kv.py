"""The ledger of one device's host memory for preempted KV.

Owns how many slots there are and which are free; a slot holds one block. Must not know requests, nor why a
block is saved.
"""

from __future__ import annotations

from collections.abc import Iterable

_GPU_BYTES = 4 << 30


def default_bytes(arena_bytes: int, *, gpu: bool) -> int:
    """Host memory for a device's KV where nobody has chosen; a CPU device's is the machine's own too."""
    return _GPU_BYTES if gpu else arena_bytes // 4


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
