"""The ledger of host memory for KV: preempted requests', and those that move to another device.

Owns how many slots each device has, which are free, what is on its way there and back. A slot holds one
block. Must not know requests, nor why a block is saved.

Every worker writes its own device's slots only, in the order in which it is told, so these change hands here
at once, as blocks do (`arena`). Every worker reads all of them: what another device is to read has to have
been copied before it is told to (`SavedKv.copied`), and its slots stay taken until it has read them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

from seallmd.core.messages import RestoreBlocks, SaveBlocks
from seallmd.core.ranks import Tables

_GPU_BYTES = 4 << 30


def default_bytes(arena_bytes: int, *, gpu: bool) -> int:
    """Host memory for a device's KV where nobody has chosen; a CPU device's is the machine's own too."""
    return _GPU_BYTES if gpu else arena_bytes // 4


@dataclass(slots=True, eq=False)
class SavedKv:
    """A request's KV in host memory.

    request: whose. slots: on each of `devices`, by rank. tokens: how many. copying: devices that are not
    known to have copied their part.
    """

    request: int
    devices: tuple[int, ...]
    slots: Tables
    tokens: int
    copying: set[int]

    @property
    def copied(self) -> bool:
        """Whether all of it is there, for any device to read."""
        return not self.copying

    def within_reach(self, devices: tuple[int, ...]) -> bool:
        """Whether these devices, in rank order, may be told to read it now."""
        return devices == self.devices or (self.copied and len(devices) == len(self.devices))


@dataclass(slots=True)
class HostKv:
    """Slots 0 .. capacity-1 of each device.

    saving: what is being copied there. restoring: who reads slots of another device, and which (reader,
    device, slots). Both by the number of the copy.
    """

    capacity: int
    free: dict[int, list[int]]
    copies: int = 0
    saving: dict[int, SavedKv] = field(default_factory=dict)
    restoring: dict[int, tuple[int, int, list[int]]] = field(default_factory=dict)

    @classmethod
    def of(cls, devices: Iterable[int], capacity: int) -> HostKv:
        """All of it free."""
        return cls(capacity, {device: list(range(capacity - 1, -1, -1)) for device in devices})

    def available(self, devices: Iterable[int]) -> int:
        """Slots that nobody has on any of the devices."""
        return min(len(self.free[device]) for device in devices)

    def used(self, device: int) -> int:
        """Slots that somebody has."""
        return self.capacity - len(self.free[device])

    def save(
        self, request: int, devices: tuple[int, ...], tables: Tables, tokens: int
    ) -> tuple[SavedKv, list[tuple[int, SaveBlocks]]]:
        """Take slots for a request's blocks; and what to tell which device.

        The caller has looked at `available`.
        """
        blocks = len(tables[0])
        assert blocks <= self.available(devices), "more slots are wanted than there are"
        self.copies += 1
        slots = tuple([self.free[device].pop() for _ in range(blocks)] for device in devices)
        saved = self.saving[self.copies] = SavedKv(request, devices, slots, tokens, set(devices))
        told = [
            (device, SaveBlocks(tuple(table), tuple(to), self.copies))
            for device, table, to in zip(devices, tables, slots, strict=True)
        ]
        return saved, told

    def restore(
        self, saved: SavedKv, devices: tuple[int, ...], tables: Tables, skip: int = 0
    ) -> list[tuple[int, RestoreBlocks]]:
        """What to tell which device to have it back in these tables, without the first `skip` blocks.

        `saved` is of no use any more.
        """
        assert saved.within_reach(devices)
        told = []
        for device, home, slots, table in zip(devices, saved.devices, saved.slots, tables, strict=True):
            back, blocks = slots[skip:], table[skip : len(slots)]
            copy, kept = 0, slots
            if device != home:
                self.copies += 1
                copy, kept = self.copies, slots[:skip]
                self.restoring[copy] = device, home, back
            self.free[home] += kept
            told.append((device, RestoreBlocks(tuple(back), tuple(blocks), copy, home)))
        return told

    def drop(self, saved: SavedKv) -> None:
        """Nobody wants it back."""
        for device, slots in zip(saved.devices, saved.slots, strict=True):
            self.free[device] += slots

    def copied(self, device: int, copy: int) -> SavedKv | None:
        """A device has made a copy. What is complete in host memory by that, if anything."""
        if copy in self.restoring:
            _, home, slots = self.restoring.pop(copy)
            self.free[home] += slots
            return None
        saved = self.saving.get(copy)
        if saved is None:
            return None
        saved.copying.discard(device)
        if saved.copying:
            return None
        del self.saving[copy]
        return saved

    def lost(self, device: int) -> None:
        """A device's worker is gone. What it had copied is there; what it was copying never will be."""
        self.saving = {n: saved for n, saved in self.saving.items() if device not in saved.copying}
        for copy in [n for n, (reader, _, _) in self.restoring.items() if reader == device]:
            self.copied(device, copy)

    def check(self, held: Iterable[SavedKv]) -> None:
        """Every slot is free, being read by another device, or in `held`, and once."""
        found = {device: Counter(slots) for device, slots in self.free.items()}
        for saved in held:
            for device, slots in zip(saved.devices, saved.slots, strict=True):
                found[device].update(slots)
        for _, home, slots in self.restoring.values():
            found[home].update(slots)
        for counts in found.values():
            slots = sorted(chain.from_iterable([slot] * count for slot, count in counts.items()))
            assert slots == list(range(self.capacity)), "a host slot is lost, or somebody's twice"
